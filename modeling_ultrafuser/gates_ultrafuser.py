"""All gates by the name that a configuration gives, and a gate in one word: "mlp", "mlp:64", "cross:128+calibration"."""

from .gate_anchor_ultrafuser import AnchorGate
from .gate_base_ultrafuser import WIDEST, Gate
from .gate_constant_ultrafuser import ConstantGate
from .gate_cross_ultrafuser import CrossGate
from .gate_evidence_ultrafuser import EvidenceGate
from .gate_linear_ultrafuser import LinearGate
from .gate_mlp_ultrafuser import MLPGate
from .gate_posterior_ultrafuser import PosteriorGate
from .gate_uniform_ultrafuser import UniformGate


GATES: dict[str, type[Gate]] = {
    "mlp": MLPGate,
    "cross": CrossGate,
    "evidence": EvidenceGate,
    "linear": LinearGate,
    "anchor": AnchorGate,
    "constant": ConstantGate,
    "uniform": UniformGate,
    "posterior": PosteriorGate,
}

# of a new model: ahead of the best specialist on every domain, without a state, see "Is fusing worth it?" in EXPERIMENTS.md
DEFAULT_GATE = "cross:128+calibration"
CALIBRATION = "+calibration"
WIDTH = 512  # of a hidden layer: the paper's (section 4.1)


def gate_settings(word: str) -> dict:
    """Parses a gate in one word into fields of the configuration.

    Args:
        word: A name in `GATES`, a colon and its setting (the width of its hidden layer, the anchor's name), "+calibration"
            for `gate_calibration`.

    Raises:
        ValueError: If there is no such gate.
    """
    text = word if isinstance(word, str) else ""
    calibrated = text.endswith(CALIBRATION)
    kind, colon, setting = text.removesuffix(CALIBRATION).partition(":")
    known = kind in GATES and (GATES[kind].can_calibrate or not calibrated)
    fields = GATES[kind].parsed(setting if colon else None) if known else None
    if fields is None:
        wide = [name for name, gate in GATES.items() if gate.has_width]
        told = [name for name, gate in GATES.items() if gate.parsed(None) is None]
        able = [name for name, gate in GATES.items() if gate.can_calibrate]
        raise ValueError(
            f"A gate is one of {list(GATES)}; {wide} may say the width of their hidden layer, at most {WIDEST}, as in "
            f"mlp:64, {told} must name a specialist, as in anchor:text, and {able} may say that they predict temperatures, "
            f"as in linear{CALIBRATION}. But got {word!r:.100}. Choose one of those."
        )
    return {"gate": kind, "gate_calibration": calibrated, "gate_hidden_size": WIDTH, **fields}


def gate_word(config) -> str:
    """Writes a configuration's gate in one word, as `gate_settings` reads it."""
    setting = GATES[config.gate].setting(config)
    return f"{config.gate}{'' if setting is None else f':{setting}'}{CALIBRATION * config.gate_calibration}"
