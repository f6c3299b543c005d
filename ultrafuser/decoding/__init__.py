"""Faster ways to decode with a fused model. All but dropping are exact: the tokens are those of plain `generate`."""

# of dropping: who is kept, and how many tokens there are from one decision to the next
KEEP, EVERY = "top_p:0.8", 8
