"""All static mixes by the name that settings give."""

from .mix_balanced import BalancedMix
from .mix_base import Mix
from .mix_fixed import FixedMix
from .mix_proportional import ProportionalMix
from .mix_temperature import TemperatureMix


MIXES: dict[str, type[Mix]] = {
    "balanced": BalancedMix,
    "proportional": ProportionalMix,
    "temperature": TemperatureMix,
    "fixed": FixedMix,
}
