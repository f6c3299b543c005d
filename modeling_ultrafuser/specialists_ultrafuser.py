"""The specialists' backbones as one part of the model."""

from .compat_ultrafuser import CollectedPlans


# the one part of `Specialists` where all specialists are adapters of it
BASE = "base"


class Specialists(CollectedPlans):
    """The specialists' backbones by name; or their base alone, where specialists are adapters of it."""
