"""All fusion rules by the name that a configuration gives."""

from .fusion_base_ultrafuser import Fusion, setting_in
from .fusion_contrast_ultrafuser import ContrastFusion
from .fusion_dynamic_ultrafuser import DynamicFusion
from .fusion_logits_ultrafuser import LogitsFusion
from .fusion_probabilities_ultrafuser import ProbabilitiesFusion
from .refusals_ultrafuser import Refusal


FUSIONS: dict[str, type[Fusion]] = {
    "logits": LogitsFusion,
    "probabilities": ProbabilitiesFusion,
    "contrast": ContrastFusion,
    "dynamic": DynamicFusion,
}


def fusion_class(word: str) -> type[Fusion]:
    """Finds a fusion rule.

    Args:
        word: A name in `FUSIONS`; a colon and its settings, if it has any.

    Raises:
        ValueError: If there is no such rule, or it has no such settings.
    """
    name = word.partition(":")[0] if isinstance(word, str) else word
    if not isinstance(name, str) or name not in FUSIONS:
        raise ValueError(f"Unknown fusion {word!r}. Choose one of {list(FUSIONS)}.")
    FUSIONS[name].parsed(setting_in(word))
    return FUSIONS[name]


def one_head_rules() -> str:
    """Lists, for error messages, the rules whose logits are one linear layer: "fusion='logits'"."""
    return " or ".join(f"fusion={name!r}" for name, rule in FUSIONS.items() if rule.one_head)


def check_loss(config) -> None:
    """Rejects a fused model whose rule has no loss, before it is trained or measured by one.

    Raises:
        ValueError: With the rule, and the way out.
    """
    if not fusion_class(config.fusion).has_loss:
        raise Refusal(
            f"`fusion` is {config.fusion!r}",
            "This rule is for decoding: the loss of a text would be infinite, or have no gradient",
            f"Train and measure the model with {one_head_rules()}, and choose this rule for answers alone, when it is loaded: "
            f"`from_pretrained(folder, fusion={config.fusion!r})`, or `ultrafuser chat FOLDER --fusion {config.fusion}`.",
            about="fusion",
        )
