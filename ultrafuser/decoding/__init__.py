"""Faster ways to decode with a fused model, each exact: the tokens are those of plain `generate`."""
