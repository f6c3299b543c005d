"""All samplers by the name that settings give."""

from .sampler_base import DomainSampler
from .sampler_stratified import StratifiedSampler


SAMPLERS: dict[str, type[DomainSampler]] = {"stratified": StratifiedSampler}
