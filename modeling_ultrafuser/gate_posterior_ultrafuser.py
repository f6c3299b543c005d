"""The "posterior" gate: who has predicted the text best so far, without anything to learn."""

from torch import Tensor

from .fusions_ultrafuser import fusion_class
from .gate_base_ultrafuser import Evidence, Gate, Reads


class PosteriorGate(Gate):
    """The fixed-share forecaster (Herbster and Warmuth, 1998) over the specialists' log-probabilities of the text so far.

    It has no parameters: a newcomer needs no training. Its weights are the posterior that each specialist is the best
    one for the next token, if the best one changes after a token with probability `gate_switch_probability`. With
    fusion="probabilities" and no switching that is a Bayesian mixture: over any text at most log N nats behind the best
    specialist; with switching also at most that behind the best sequence of specialists, plus a price for each change.
    """

    can_be_signed = False
    reads = Reads.PAST

    def __init__(self, config):
        super().__init__(config)
        self.evidence = Evidence(switches=(switch_probability(config),))

    def scores(self, hidden_states: list[Tensor], *evidence: Tensor) -> Tensor:
        return evidence[0][..., 0].float()


def switch_probability(config) -> float:
    """Reads it from the configuration; by default it is what suits the fusion rule, chosen on text to fuse with."""
    given = config.gate_switch_probability
    return fusion_class(config.fusion).switch_probability if given is None else given
