"""Signed weights: a number for each specialist, of either sign, that the gate's scores are added to.

With numbers s, scores g that begin at 0 and a temperature T the weights are s + g / T, where else they are softmax(g / T).
So z = z_large + a (z_tuned - z_base) is three specialists, a gate without scores ("uniform") and s = (1, a, -a): emulated
fine-tuning (Mitchell et al., 2023, arXiv 2310.12962) and proxy-tuning (Liu et al., 2024, arXiv 2401.08565). With a gate
that learns, s = (1, 0, 0) is a shared specialist that always counts, and learned corrections.
"""

from collections.abc import Iterator, Mapping, Sequence

from .files_ultrafuser import is_number
from .fusions_ultrafuser import fusion_class, one_head_rules
from .gates_ultrafuser import GATES
from .refusals_ultrafuser import Refusal
from .sparsifiers_ultrafuser import NONE


RULE = "Signed weights are one finite number for each specialist, not all of them 0"


def check_signed(config) -> None:
    """Rejects signed weights that are no numbers, and what does not go together with them.

    Raises:
        ValueError: With the fact, the rule and the way out.
    """
    given, names = config.signed_weights, config.specialist_names
    numbers = given if isinstance(given, list | tuple) else []
    if not any(numbers) or len(numbers) != len(names) or not all(map(is_number, numbers)):
        way_out = f"Give {len(names)} numbers, for {names}, or leave `signed_weights` out."
        raise Refusal(f"`signed_weights` is {given!r:.100}", RULE, way_out, about="gate")
    for fact, rule, way_out in _conflicts(config):
        raise Refusal(
            f"{fact} and `signed_weights` are {given}",
            rule,
            f"{way_out}, or leave `signed_weights` out.",
            about="gate",
        )


def _conflicts(config) -> Iterator[tuple[str, str, str]]:
    fusion, rules = fusion_class(config.fusion), one_head_rules()
    if not fusion.one_head:
        rule = "A rule without one wide head needs weights that are shares"
        yield f"`fusion` is {config.fusion!r}", rule, f"Choose {rules}"
    elif fusion.fused_cap(config) is not None:
        rule = "A bounded sum of logits is not the sum of the specialists' bounded logits"
        yield (
            "the specialists bound their logits (`final_logit_softcapping`)",
            rule,
            "Choose specialists without a bound",
        )
    if config.gate_sparsifier != NONE:
        rule = "A sparsifier leaves out the smallest shares, and signed weights are no shares"
        yield f"`gate_sparsifier` is {config.gate_sparsifier!r}", rule, "Leave the sparsifier out"
    if not GATES[config.gate].can_be_signed:
        able = [name for name, gate in GATES.items() if gate.can_be_signed]
        yield f"`gate` is {config.gate!r}", "Its scores are the logarithms of shares", f"Choose one of {able}"


def in_order(weights: Mapping[str, float] | Sequence[float] | None, names: Sequence[str]) -> list[float] | None:
    """Returns signed weights in the order of the specialists.

    Args:
        weights: By the specialists' names, or in their order already.
        names: Of the specialists.

    Raises:
        ValueError: If a name is unknown or missing.
    """
    if not isinstance(weights, Mapping):
        return weights
    if sorted(weights) != sorted(names):
        way_out = f"Give one for each of {list(names)}."
        raise Refusal(f"`signed_weights` are given for {sorted(weights)}", RULE, way_out, about="gate")
    return [weights[name] for name in names]
