"""Gates of other papers, transferred from layers to whole models, and how each of them is fitted.

None is part of the product. Their classes are put in place of a fused model's gate; those that are fitted jointly are
trained by stage one, as the plain gate is. Where a paper scales the output of a module, here it is a model's logits, and
where it reads the input of a layer that all modules share, here it is the specialists' last hidden states.
"""

from collections.abc import Callable, Iterator
from functools import cache, cached_property
from statistics import mean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel, get_constant_schedule_with_warmup, set_seed
from transformers import initialization as init

from experiments.baseline_runs import Fusions, load
from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.gate_base_ultrafuser import Gate, Reads, empty, linear, run_before_specialists
from modeling_ultrafuser.sparsifiers_ultrafuser import NONE, sparsifier
from ultrafuser.build.specialist_edits import add_specialist
from ultrafuser.evaluation.measurement import MIXED
from ultrafuser.quickstart.corpora import DOMAINS


if TYPE_CHECKING:
    from experiments.strategy_runs import Losses, Subject


RANK = 64  # of queries and keys
HIDDEN = 512  # of the network that reads entropies
ROWS = 12  # blocks that are read at once
Fits = Iterator[tuple[str, UltraFuserForCausalLM]]
MLP_RATE = 3e-3  # as the plain gate's; those of one layer have the rate of the "linear" gate


class PrototypeGate(Gate):
    """One vector per specialist (PHATGOOSE; Muqeet et al., 2024, arXiv 2402.05859, section 3).

    score_k = LN(v_k) . LN(h_k) / sqrt(d), with LN the layer norm without scale and shift. Hidden sizes must be equal.
    """

    def __init__(self, config):
        super().__init__(config)
        self.vectors = empty(self.num_specialists, self.widths[0])

    def scores(self, hidden_states: list[Tensor]) -> Tensor:
        states, size = torch.stack(hidden_states, dim=-2), self.widths[:1]
        return (F.layer_norm(self.vectors.float(), size) * F.layer_norm(states, size)).sum(-1) / size[0] ** 0.5

    def init_weights(self) -> None:
        # a layer norm of zeros has no direction to go
        init.normal_(self.vectors)


class DomainGate(Gate):
    """A vector per specialist that is projected from an embedding of its domain (Nexus; Gritsch et al., 2024, arXiv 2408.15901).

    score_k = x . P(e_k), P(e) = W2 SwiGLU(W1 e), where e_k is the mean state of the domain's text in a model that none of the
    specialists is. x is the state of the trunk there, and here the specialists' states side by side: of the first `reads`,
    so that one that joins later changes no score of theirs.

    Args:
        config: The fused model's.
        embeddings: Shape (specialists, size).
        reads: Number of specialists.
    """

    learning_rate = MLP_RATE

    def __init__(self, config, embeddings: Tensor, reads: int):
        super().__init__(config)
        self.embeddings, self.reads_first = embeddings, reads
        size = sum(self.widths[:reads])
        self.first, self.second = empty(2 * size, embeddings.shape[1]), empty(size, size)

    def scores(self, hidden_states: list[Tensor]) -> Tensor:
        gated, value = linear(self.embeddings, self.first).chunk(2, dim=-1)
        vectors = linear(F.silu(gated) * value, self.second)
        return linear(torch.cat(hidden_states[: self.reads_first], dim=-1), vectors)

    def init_weights(self) -> None:
        super().init_weights()
        init.normal_(self.first, std=self.first.shape[1] ** -0.5)


class AttentionGate(Gate):
    """A query of the mean state, and a key of each specialist's own (AdapterFusion; Pfeiffer et al., 2020, arXiv 2005.00247).

    score_k = q(mean h) . K_k h_k / sqrt(r), section 3.2; what is attended to, their value matrix times the adapters' outputs,
    is the specialists' logits. Hidden sizes must be equal.
    """

    learning_rate = MLP_RATE

    def __init__(self, config):
        super().__init__(config)
        self.query, self.keys = empty(RANK, self.widths[0]), empty(self.num_specialists, RANK, self.widths[0])

    def scores(self, hidden_states: list[Tensor]) -> Tensor:
        query = linear(torch.stack(hidden_states).mean(0), self.query)
        keys = [linear(h, key) for h, key in zip(hidden_states, self.keys, strict=True)]
        return torch.stack([(query * key).sum(-1) for key in keys], dim=-1) / RANK**0.5

    def init_weights(self) -> None:
        super().init_weights()
        init.normal_(self.keys, std=self.widths[0] ** -0.5)


class EntropyGate(Gate):
    """A network that reads how unsure each specialist is (CombLM; Ormazabal et al., 2023, arXiv 2305.16876, section 3.1).

    Entropies, normalised over a batch, two hidden layers with ReLU; for two models they end in a sigmoid, here in a softmax.

    Args:
        config: The fused model's.
        heads: Each specialist's columns of the wide head. Shapes (vocab, hidden).
    """

    def __init__(self, config, heads: list[Tensor]):
        super().__init__(config)
        self.heads = heads
        layers = [nn.Linear(self.num_specialists, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()]
        self.network = nn.Sequential(
            nn.BatchNorm1d(self.num_specialists), *layers, nn.Linear(HIDDEN, self.num_specialists)
        )

    def scores(self, hidden_states: list[Tensor]) -> Tensor:
        entropies = torch.stack([entropy(log_probs(h, w)) for h, w in zip(hidden_states, self.heads, strict=True)], -1)
        return self.network(entropies.flatten(0, -2)).unflatten(0, entropies.shape[:-1])

    def init_weights(self) -> None:
        # from zeros two hidden layers would not move
        for layer in self.network:
            if not isinstance(layer, nn.ReLU):
                layer.reset_parameters()


def log_probs(states: Tensor, head: Tensor) -> Tensor:
    """Returns log-probabilities of one specialist. Shape (..., vocab)."""
    return F.linear(states, head).log_softmax(-1)


def entropy(log_probabilities: Tensor) -> Tensor:
    """Returns entropies in nats. Shape (...,), of (..., vocab)."""
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


# ---------------------------------------------------------------------------------------------- how each is fitted


def fusions_of(subject: "Subject", domains=DOMAINS) -> Fusions:
    """Makes fused models of the specialists of some domains, on text to fuse with of theirs."""
    data = {d: subject.blocks[d]["fuse"] for d in domains}
    return Fusions(subject.folder, subject.tokenizer, data, subject.examples_per_domain, subject.seed)


def fused(subject: "Subject", gate: Callable[[UltraFuserForCausalLM], Gate], *, domains=DOMAINS, fusion="logits"):
    """Returns a fused model with a gate of this module that is not fitted yet."""
    set_seed(subject.seed)
    parts = {d: subject.folder / d for d in domains}
    model = UltraFuserForCausalLM.from_specialists(parts, gate="uniform", fusion=fusion)
    model.model.fusion_gate = gate(model)
    model.model.fusion_gate.init_weights()
    return model.eval()


def jointly(subject: "Subject", gate: Callable[[UltraFuserForCausalLM], Gate], *, domains=DOMAINS):
    """Fits by stage one, with the settings of the plain gate but its own learning rate and no prior on temperatures."""
    model = fused(subject, gate, domains=domains)
    own = {"learning_rate": model.model.fusion_gate.learning_rate, "gate_scale": 0.0}
    fusions_of(subject, domains).train(model, {**subject.plain["stage"], **own})
    return model.eval()


def of_product(subject: "Subject", gate: str, fusion: str = "logits", learning_rate: float | None = MLP_RATE):
    """Fits a gate of the product, by its word, with the settings of the plain gate but its own learning rate.

    Without a learning rate it is as it was fused.
    """
    if learning_rate is None:
        return load(fusions_of(subject).gate(gate, fusion))
    scale = {} if gate.endswith("+calibration") else {"gate_scale": 0.0}
    stage = {**subject.plain["stage"], "learning_rate": learning_rate, **scale}
    return load(fusions_of(subject).gate(gate, fusion, stage))


def alone(subject: "Subject", keep: list[str], *, steps: int = 100, rate: float = 5e-3, warm_up: float = 0.06) -> Fits:
    """Fits each prototype without the other specialists: on its own domain, scaling its own logits by sigmoid(v . h).

    PHATGOOSE's recipe: 100 steps of AdamW without weight decay at a constant 5e-3 after 6 % of warm-up, from zero. Then all
    are put side by side, under one sparsifier after another.
    """
    model = fused(subject, lambda model: PrototypeGate(model.config))
    heads = heads_of(model)
    for k, domain in enumerate(DOMAINS):
        states, labels = states_of(model.specialist(domain), subject.blocks[domain]["fuse"])
        vector = nn.Parameter(torch.zeros(heads[k].shape[1]))
        optimizer = torch.optim.AdamW([vector], lr=rate, weight_decay=0.0)
        schedule = get_constant_schedule_with_warmup(optimizer, int(warm_up * steps))
        rng = torch.Generator().manual_seed(subject.seed)
        for _ in range(steps):
            rows = torch.randint(len(states), (ROWS,), generator=rng)
            scaled = (states[rows] @ vector).sigmoid()[..., None] * F.linear(states[rows], heads[k])
            loss = F.cross_entropy(scaled.flatten(0, -2), labels[rows].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            model.model.fusion_gate.vectors[k] = vector
    for word in keep:
        model.model.fusion_gate.sparsifier = sparsifier(word)
        yield ("" if word == NONE else f", {word}"), model


def by_entropies(subject: "Subject", epochs: list[int], *, rate: float = 2e-3, batch: int = 1024) -> Fits:
    """Fits the network on entropies by the loss of mixed probabilities: Adam at 2e-3, 1,024 tokens in a batch.

    What it is after each of several numbers of epochs; the paper's is one.
    """
    model = fused(subject, lambda model: EntropyGate(model.config, heads_of(model)), fusion="probabilities")
    network, blocks = model.model.fusion_gate.network, torch.cat([subject.blocks[d]["fuse"] for d in DOMAINS])
    read = []
    for domain, head in zip(DOMAINS, heads_of(model), strict=True):
        states, labels = states_of(model.specialist(domain), blocks)
        for own, label in zip(states, labels, strict=True):
            predicted = log_probs(own, head)
            read.append(torch.stack([entropy(predicted), predicted.gather(-1, label[:, None])[:, 0]]))
    # entropies and log-probabilities of labels by token and specialist
    entropies, of_labels = torch.cat(read, dim=-1).unflatten(-1, (len(DOMAINS), -1)).mT
    optimizer, rng = torch.optim.Adam(network.parameters(), lr=rate), torch.Generator().manual_seed(subject.seed)
    for epoch in range(1, max(epochs) + 1):
        network.train()
        for rows in torch.randperm(len(entropies), generator=rng).split(batch):
            loss = -(network(entropies[rows]).log_softmax(-1) + of_labels[rows]).logsumexp(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch in epochs:
            yield f", epochs: {epoch}", model.eval()


@torch.no_grad()
def states_of(specialist: PreTrainedModel, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a specialist's states at all tokens that another one follows, and those. Shapes (blocks, seq - 1, hidden), (blocks, seq - 1)."""
    return read(specialist.model, blocks)[:, :-1], blocks[:, 1:]


class Measured:
    """Measures fused models of the same specialists, which read held-out text once for all of them.

    Args:
        subject: Specialists, and what is measured on.
    """

    def __init__(self, subject: "Subject"):
        self.tests, self.folder = subject.tests, subject.folder

    @cached_property
    @torch.inference_mode()
    def states(self) -> dict[str, dict[str, Tensor]]:
        """Returns last hidden states by specialist and domain. Shapes (examples, seq, hidden)."""
        backbones = {name: load(self.folder / name).model for name in DOMAINS}
        return {
            n: {d: read(backbone, test.input_ids) for d, test in self.tests.items()}
            for n, backbone in backbones.items()
        }

    @torch.inference_mode()
    def losses(self, model: UltraFuserForCausalLM) -> "Losses":
        """Returns nats per token by domain, as `mean_loss` gives them. The gate must not read the past."""
        names, found = model.config.specialist_names, {}
        for domain, test in self.tests.items():
            parts = []
            for rows in torch.arange(len(test)).split(ROWS):
                ids, states = test.input_ids[rows], [self.states[name][domain][rows] for name in names]
                ahead = run_before_specialists(model.model.fusion_gate, ids)
                fused_states, output = model.model.weighed(states, gate_output=ahead)
                log_p = model.logits(fused_states, output.weights)[:, :-1].log_softmax(-1)
                parts.append(-log_p.gather(-1, ids[:, 1:, None])[..., 0])
            found[domain] = torch.cat(parts)[test.scored[:, 1:]].mean().item()
        return found


def read(backbone: PreTrainedModel, ids: Tensor) -> Tensor:
    """Returns a backbone's last hidden states. Shape (rows, seq, hidden)."""
    return torch.cat([backbone(part).last_hidden_state for part in ids.split(ROWS)])


def heads_of(model: UltraFuserForCausalLM) -> list[Tensor]:
    """Returns each specialist's columns of the wide head. Shapes (vocab, hidden)."""
    return [model.lm_head.weight.detach()[:, columns] for columns in model.head_columns()]


@torch.no_grad()
def embeddings_of(subject: "Subject", domains) -> Tensor:
    """Embeds domains by the base's mean state over text to fuse with, normalised. Shape (domains, hidden)."""
    base, means = load(subject.folder / "base"), []
    for domain in domains:
        means.append(states_of(base, subject.blocks[domain]["fuse"])[0].mean((0, 1)))
    means = torch.stack(means)
    return F.layer_norm(means, means.shape[1:])


def by_domain(subject: "Subject", domains=DOMAINS, newcomer: str | None = None):
    """Fits projections of domain embeddings; a newcomer then joins by its embedding alone, without training."""
    embeddings = embeddings_of(subject, domains)
    model = jointly(subject, lambda m: DomainGate(m.config, embeddings, len(domains)), domains=domains)
    if newcomer is None:
        return model
    fitted, everyone = model.model.fusion_gate, [*domains, newcomer]
    embeddings = embeddings_of(subject, everyone)
    larger = fused(subject, lambda m: DomainGate(m.config, embeddings, len(domains)), domains=everyone)
    larger.model.fusion_gate.load_state_dict(fitted.state_dict())
    return larger


METHODS: dict[str, Callable] = {
    "product": of_product,
    "prototypes": lambda subject: jointly(subject, lambda model: PrototypeGate(model.config)),
    "domain embeddings": by_domain,
    "attention": lambda subject: jointly(subject, lambda model: AttentionGate(model.config)),
}
# several rows of one fit, by what is added to the name
SERIES: dict[str, Callable[..., Fits]] = {"prototypes alone": alone, "entropies": by_entropies}


def published(subject: "Subject", words: dict[str, dict]) -> dict[str, "Losses"]:
    """Fits gates by row: a name in `METHODS` or `SERIES`, and its settings."""
    rows, measured = {}, Measured(subject)
    for name, how in words.items():
        how = dict(how)
        method = how.pop("method")
        fits = SERIES[method](subject, **how) if method in SERIES else [("", METHODS[method](subject, **how))]
        rows |= {name + more: measured.losses(model) for more, model in fits}
    return rows


def newcomers(subject: "Subject", words: list[str]) -> dict[str, "Losses"]:
    """Adds each specialist to the two others, whose gate knows nothing of its domain, without training.

    A column is of the model that the specialist of that domain has joined; mixed items are the mean of the three. "others" is
    the mean over domains of the two that were there.
    """
    plain = cache(lambda *domains: load(fusions_of(subject, domains).gate(**subject.plain)))
    projected = cache(lambda *domains: by_domain(subject, domains))
    posterior = cache(lambda: load(fusions_of(subject).gate("posterior", "logits")))
    past = cache(subject.losses)
    measured = cache(Measured(subject).losses)
    models = {
        "plain gate of all three": lambda new, *others: plain(*DOMAINS),
        "domain embeddings of all three": lambda new, *others: projected(*DOMAINS),
        "domain embedding of the newcomer": lambda new, *others: by_domain(subject, others, new),
        "plain gate, ultrafuser add": lambda new, *others: add_specialist(plain(*others), new, subject.folder / new),
        "plain gate, no newcomer": lambda new, *others: plain(*others),
        "posterior gate": lambda new, *others: posterior(),
    }

    def losses(model: UltraFuserForCausalLM) -> "Losses":
        return past(model) if Reads.PAST in model.model.fusion_gate.reads else measured(model)

    rows: dict[str, dict[str, float]] = {}
    for name in words:
        found = {new: losses(models[name](new, *(d for d in DOMAINS if d != new))) for new in DOMAINS}
        rows[name] = {new: own[new] for new, own in found.items()}
        rows[name][MIXED] = mean(own[MIXED] for own in found.values())
        rows[name]["others"] = mean(own[d] for new, own in found.items() for d in DOMAINS if d != new)
    return rows


KINDS = {"published gates": published, "newcomers": newcomers}
