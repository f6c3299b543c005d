"""All gates by the name that a configuration gives."""

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
