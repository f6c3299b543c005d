"""Baselines from the same specialists without a trained gate. No weights are copied."""

import copy
from collections.abc import Mapping

import torch
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.gate_base_ultrafuser import Gate, GateOutput
from modeling_ultrafuser.gates_ultrafuser import GATES
from modeling_ultrafuser.sparsifiers_ultrafuser import NONE

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


class RequestGate(Gate):
    """One weight per specialist for a whole request. `weights`, of shape (batch, specialists), is set from outside."""

    weights: Tensor

    def forward(self, hidden_states: list[Tensor]) -> GateOutput:
        weights = self.weights.to(hidden_states[0].device, torch.float32)
        return GateOutput(weights[:, None].expand(-1, hidden_states[0].shape[1], -1))


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
    return (-prompt_losses(specialists, data) / temperature).softmax(-1)


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


def train_router(prompts: list[str], best: list[int]):
    """A classifier of prompts, as request-level routers are: logistic regression on character n-grams.

    Where one specialist is always best, it is always chosen.

    Args:
        prompts: Text that a router reads.
        best: The specialist that answered each one best.

    Returns:
        A scikit-learn classifier with `predict(prompts)`.
    """
    if len(set(best)) == 1:
        return DummyClassifier(strategy="most_frequent").fit(prompts, best)
    features = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), max_features=20_000, sublinear_tf=True)
    return make_pipeline(features, LogisticRegression(C=10.0, max_iter=1000)).fit(prompts, best)


def prompt_texts(data: HeldOut, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The prompts as text, for a router."""
    return [tokenizer.decode(ids[kept]) for ids, kept in zip(data.input_ids, data.prompt, strict=True)]
