"""Baselines from the same specialists without a trained gate. No weights are copied."""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.gate_base_ultrafuser import Gate, GateOutput, Reads
from modeling_ultrafuser.gates_ultrafuser import GATES
from modeling_ultrafuser.sparsifiers_ultrafuser import NONE

from ..route import router_perplexity
from .measurement import HeldOut, Scores


def ensemble(
    model: UltraFuserForCausalLM, gate: str | Gate, fusion: str = "logits", *, calibrated: bool | None = None
) -> UltraFuserForCausalLM:
    """The same specialists under another gate or fusion rule. Shares its tensors with `model`.

    Args:
        model: A fused model.
        gate: Name of a gate, made anew: "uniform" is the plain average, "constant" one tuned weight per specialist
            once trained. Or a gate that is there.
        fusion: "logits", or "probabilities": the classical mixture.
        calibrated: Whether the gate predicts temperatures. Default: as the model's own, and no gate made anew does.
    """
    config = copy.deepcopy(model.config)
    config.fusion = fusion
    if isinstance(gate, str):
        config.gate, config.gate_calibration, config.gate_sparsifier = gate, False, NONE
        config.signed_weights = None
    if calibrated is not None:
        config.gate_calibration = calibrated
    with torch.device("meta"):
        other = UltraFuserForCausalLM(config)
    other.model.specialists, other.lm_head = model.model.specialists, model.lm_head
    other.generation_config = model.generation_config
    if isinstance(gate, str):
        gate = GATES[gate](config).to(model.lm_head.weight.device)
        gate.init_weights()
    other.model.fusion_gate = gate
    return other.eval()


class RandomGate(Gate):
    """A control: weights drawn anew for every token, evenly from all that sum to 1."""

    def __init__(self, config, seed: int = 0):
        super().__init__(config)
        self.rng = torch.Generator().manual_seed(seed)

    def forward(self, hidden_states: list[Tensor]) -> GateOutput:
        shape = (*hidden_states[0].shape[:-1], self.num_specialists)
        drawn = torch.empty(shape).exponential_(generator=self.rng).to(hidden_states[0].device)
        return GateOutput(drawn / drawn.sum(-1, keepdim=True))


class ShuffledGate(Gate):
    """A control: a gate's own weights, dealt out among the tokens of each example at random. Scales stay.

    `lengths`, of shape (examples,), is set from outside where examples are padded: padding keeps its weights to itself.
    """

    lengths: Tensor | None = None

    def __init__(self, config, gate: Gate, seed: int = 0):
        super().__init__(config)
        self.gate, self.rng = gate, torch.Generator().manual_seed(seed)
        self.reads, self.evidence = gate.reads, gate.evidence

    def forward(self, hidden_states: list[Tensor], *evidence: Tensor) -> GateOutput:
        weights, scales = self.gate(hidden_states, *evidence)
        drawn = torch.rand(weights.shape[:2], generator=self.rng)
        if self.lengths is not None:
            drawn = drawn.masked_fill(torch.arange(drawn.shape[1]) >= self.lengths[:, None], 2.0)
        places = drawn.argsort(-1).to(weights.device)
        return GateOutput(weights.gather(1, places[..., None].expand_as(weights)), scales)


class TokenGate(Gate):
    """A control: what another gate says of a token in the mean over texts, whatever stands before it there.

    Args:
        config: Of the fused model.
        weights: By token id. Shape (vocab, specialists).
        scales: Of a calibrated gate. Shape (vocab, 1 or specialists).
    """

    reads = Reads.PROMPT

    def __init__(self, config, weights: Tensor, scales: Tensor | None):
        super().__init__(config)
        self.weights, self.scales = weights, scales

    def forward(self, hidden_states: list[Tensor], *_) -> GateOutput:
        ids = hidden_states[0][..., 0]
        return GateOutput(*(None if table is None else table[ids] for table in (self.weights, self.scales)))


@torch.no_grad()
def by_token(model: UltraFuserForCausalLM, data: Iterable[HeldOut]) -> TokenGate:
    """Averages a model's gate by the token that it reads; a token that is nowhere in the data has the mean over all.

    Args:
        model: A fused model.
        data: Examples, one domain after another.
    """
    sums, counts = None, torch.zeros(model.config.vocab_size, 1, device=model.device)
    for examples in data:
        for row, mask in zip(examples.input_ids, examples.attention_mask.bool(), strict=True):
            ids = row[mask].to(model.device)
            found = model.model(input_ids=ids[None], use_cache=False, return_dict=True)
            # of factors on logits, the geometric mean
            said = [found.gate_weights, *([] if found.logit_scales is None else [found.logit_scales.log()])]
            said = torch.cat(said, -1)[0].float()
            sums = torch.zeros(len(counts), said.shape[1], device=said.device) if sums is None else sums
            sums.index_add_(0, ids, said)
            counts.index_add_(0, ids, torch.ones(len(ids), 1, device=ids.device))
    table = torch.where(counts > 0, sums / counts.clamp(min=1), sums.sum(0) / counts.sum())
    weights, scales = table.split([n := len(model.config.specialists), table.shape[1] - n], dim=-1)
    return TokenGate(model.config, weights, scales.exp() if scales.shape[1] else None)


class LoneGate(Gate):
    """All weight on one specialist, with the temperatures that another gate predicts: calibration without fusion.

    Args:
        config: With `gate_calibration`.
        gate: Predicts the temperatures: "constant", one for all tokens, or "cross", one for each.
        index: Index of the specialist.
    """

    def __init__(self, config, gate: Gate, index: int):
        super().__init__(config)
        self.gate, self.index = gate, index

    def forward(self, hidden_states: list[Tensor]) -> GateOutput:
        weights, scales = self.gate(hidden_states)
        alone = torch.zeros_like(weights)
        alone[..., self.index] = 1
        return GateOutput(alone, scales)


def tempered(model: UltraFuserForCausalLM, gate: str, index: int) -> UltraFuserForCausalLM:
    """One of the specialists, with temperatures to be trained. Shares its tensors with `model`.

    Args:
        model: A fused model.
        gate: As for `LoneGate`.
        index: Index of the specialist.
    """
    found = ensemble(model, gate, calibrated=True)
    found.model.fusion_gate = LoneGate(found.config, found.model.fusion_gate, index)
    return found.eval()


def prompt_losses(specialists: Mapping[str, Scores], data: HeldOut) -> Tensor:
    """Mean loss of each specialist on each prompt, in nats per token. Shape (examples, specialists)."""
    read = data.prompt.clone()
    read[:, 0] = False
    return torch.stack([(s.losses * read).sum(-1) / read.sum(-1).clamp(min=1) for s in specialists.values()], dim=-1)


def perplexity_weights(specialists: Mapping[str, Scores], data: HeldOut, temperature: float = 1.0) -> Tensor:
    """Weights of PackLLM-sim (Mavromatis et al., 2024, arXiv 2404.11531): softmax of -log perplexity of the prompt.

    Returns:
        Weights for whole requests. Shape (examples, specialists).
    """
    return router_perplexity.weights(prompt_losses(specialists, data), temperature)


def response_losses(specialists: Mapping[str, Scores], data: HeldOut) -> Tensor:
    """Summed loss of each specialist on each response. Shape (examples, specialists)."""
    return torch.stack([(s.losses * data.scored).sum(-1) for s in specialists.values()], dim=-1)


def select(specialists: Mapping[str, Scores], chosen: Tensor) -> Scores:
    """The scores of one specialist per request.

    Args:
        specialists: By name.
        chosen: Which of them answers. Shape (examples,).
    """
    rows = torch.arange(len(chosen))
    return Scores(*(torch.stack(own)[chosen, rows] for own in zip(*specialists.values(), strict=True)))
