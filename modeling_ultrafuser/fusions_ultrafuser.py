"""All fusion rules by the name that a configuration gives."""

from .fusion_base_ultrafuser import Fusion
from .fusion_logits_ultrafuser import LogitsFusion
from .fusion_probabilities_ultrafuser import ProbabilitiesFusion


FUSIONS: dict[str, type[Fusion]] = {
    "logits": LogitsFusion,
    "probabilities": ProbabilitiesFusion,
}


def one_head_rules() -> str:
    """Lists, for error messages, the rules whose logits are one linear layer: "fusion='logits'"."""
    return " or ".join(f"fusion={name!r}" for name, rule in FUSIONS.items() if rule.one_head)
