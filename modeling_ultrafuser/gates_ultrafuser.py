"""All gates by the name that a configuration gives, and a gate in one word: "mlp", "mlp:64", "cross:128+calibration"."""

import re

from .gate_base_ultrafuser import Gate
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
    "constant": ConstantGate,
    "uniform": UniformGate,
    "posterior": PosteriorGate,
}

# of a new model: ahead of the best specialist on every domain, without a state, see "Is fusing worth it?" in EXPERIMENTS.md
DEFAULT_GATE = "cross:128+calibration"
CALIBRATION = "+calibration"
WIDTH, WIDEST = 512, 1 << 16  # of a hidden layer: the paper's (section 4.1), and the most


def gate_settings(word: str) -> dict:
    """Parses a gate in one word into fields of the configuration.

    Args:
        word: A name in `GATES`, a colon and the width of its hidden layer, "+calibration" for `gate_calibration`.

    Raises:
        ValueError: If there is no such gate.
    """
    text = word if isinstance(word, str) else ""
    calibrated = text.endswith(CALIBRATION)
    kind, colon, width = text.removesuffix(CALIBRATION).partition(":")
    known = kind in GATES and (GATES[kind].can_calibrate or not calibrated)
    wide_enough = re.fullmatch(r"[1-9][0-9]{0,8}", width) and int(width) <= WIDEST
    if not known or (colon and not (GATES[kind].has_width and wide_enough)):
        wide = [name for name, gate in GATES.items() if gate.has_width]
        able = [name for name, gate in GATES.items() if gate.can_calibrate]
        raise ValueError(
            f"A gate is one of {list(GATES)}; {wide} may say the width of their hidden layer, at most {WIDEST}, as in "
            f"mlp:64, and {able} that they predict temperatures, as in linear{CALIBRATION}. But got {word!r:.100}. Choose "
            f"one of those."
        )
    return {"gate": kind, "gate_calibration": calibrated, "gate_hidden_size": int(width or WIDTH)}
