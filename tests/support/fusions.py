"""Fusion rules that go with any gate and any number of specialists, and can be trained."""

from modeling_ultrafuser.fusions_ultrafuser import FUSIONS


MIXTURES = [name for name, rule in FUSIONS.items() if rule.has_loss]
