"""Losses by fusion rule, of which a rule without a line here has a slower one: its full logits, some positions at a time."""

from .head_base import Head
from .head_logits import LogitsHead
from .head_probabilities import ProbabilitiesHead


HEADS: dict[str, type[Head]] = {
    "logits": LogitsHead,
    "probabilities": ProbabilitiesHead,
}


def head_of(config) -> Head:
    """Makes the head of a fused model's configuration."""
    return HEADS.get(config.fusion, Head)(config)
