"""Measures strategies beside the plain gate: sparsifiers, signed weights, terms of the loss, gates of other papers.

Specialists, data and gate are those of `baseline_runs`. A variant is one kind of strategy in its intended setting, with the
baselines that it has to beat; its `words` are what a user would write on the command line.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging

from experiments import published_gates
from experiments.baseline_runs import (
    EXAMPLES,
    Fusions,
    check_gate,
    examples_of,
    folder_of,
    load,
    mixed,
    specialists_of,
)
from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.sparsifiers_ultrafuser import sparsifier
from ultrafuser.evaluation.measurement import MIXED, HeldOut, mean_loss
from ultrafuser.quickstart.corpora import DOMAINS


Losses = dict[str, float]  # nats per token by domain, and on mixed items


@dataclass
class Subject:
    """Specialists, the plain gate, and what is measured on.

    Attributes:
        seed: Of everything random.
        folder: Of the specialists.
        blocks: Token ids by domain and split.
        tokenizer: Of all models.
        make: Trains and keeps a further single model: see `specialists_of`.
        plain: How the gate is made: a gate, a fusion rule, a stage.
        examples_per_domain: In every batch of a stage.
    """

    seed: int
    folder: Path
    blocks: dict[str, dict[str, Tensor]]
    tokenizer: object
    make: Callable
    plain: dict
    examples_per_domain: int

    def __post_init__(self):
        self.tests, self.tune = self._examples("held_out"), self._examples("fuse")

    def _examples(self, split: str) -> dict[str, HeldOut]:
        few = {d: self.blocks[d][split][:EXAMPLES] for d in DOMAINS}
        return {d: examples_of(x, self.tokenizer) for d, x in {**few, MIXED: mixed(few, self.seed, EXAMPLES)}.items()}

    @cached_property
    def fused(self) -> UltraFuserForCausalLM:
        """Returns the fused model with the plain gate."""
        return self.gate()

    def gate(self, **more) -> UltraFuserForCausalLM:
        """Returns a fused model whose stage one has further settings."""
        data = {d: self.blocks[d]["fuse"] for d in DOMAINS}
        fusions = Fusions(self.folder, self.tokenizer, data, self.examples_per_domain, self.seed)
        return load(fusions.gate(**{**self.plain, "stage": {**self.plain["stage"], **more}}))

    def losses(self, model) -> Losses:
        """Measures a model."""
        return _some(self, model, list(self.tests))


def sparsified(subject: Subject, words: list[str]) -> dict[str, Losses]:
    """Applies sparsifiers to the plain gate. Each row has the mean number of specialists with a weight, too."""
    model, rows = subject.fused, {}
    for word in words:
        model.model.fusion_gate.sparsifier = sparsifier(word)
        weights = {d: model.gate_weights(x.input_ids) for d, x in subject.tests.items()}
        number = {d: (w > 0).sum(-1).float().mean().item() for d, w in weights.items()}
        rows[word] = subject.losses(model) | {"kept": sum(number[d] for d in DOMAINS) / len(DOMAINS)}
        rows[word]["kept, mixed"] = number[MIXED]
    return rows


def signed(subject: Subject, words: list[str], *, newer: dict, tuned: dict) -> dict[str, Losses]:
    """Ports what a specialist learned to a newer version of its base: newer + a (specialist - base).

    A column is measured with the specialist of that domain; mixed items with that of mathematics.

    Args:
        subject: Base and specialists.
        words: Factors a; or a fusion rule that finds them at every token, "dynamic:newer,old".
        newer: Steps and rate of the base on further text of all domains.
        tuned: Steps and rate of the newer base on a domain itself.
    """
    make, further = subject.make, torch.cat([subject.blocks[d]["fuse"] for d in DOMAINS])
    start = make("newer base", partial(load, subject.folder / "base"), further, **newer)
    rows: dict[str, Losses] = {}
    for domain in DOMAINS:
        old, specialist = subject.folder / "base", subject.folder / domain
        own = make(f"newer {domain}", partial(load, start), subject.blocks[domain]["specialist"], **tuned)
        measured_on = [domain, MIXED] if domain == "math" else [domain]
        models = {"newer base": start, "specialist of the old base": specialist, "newer base, tuned itself": own}
        for name, folder in models.items():
            rows.setdefault(name, {}).update(_some(subject, load(folder), measured_on))
        two = UltraFuserForCausalLM.from_specialists({"newer": start, "tuned": specialist}, gate="uniform")
        fused = {"newer base and specialist, uniform": two}
        fused |= {_named(word): _ported(start, old, {"tuned": specialist}, word) for word in words}
        for name, model in fused.items():
            rows.setdefault(name, {}).update(_some(subject, model, measured_on))
    return rows


def together(subject: Subject, words: list[str], *, newer: dict, examples: int) -> dict[str, Losses]:
    """Ports what all specialists learned to a newer version of their base: newer + a sum_k (specialist_k - base).

    Nobody says of which domain a text is. Beside it are the plain gate of the specialists, and their uniform mean.

    Args:
        subject: Base and specialists.
        words: As for `signed`.
        newer: As for `signed`.
        examples: Of each domain to measure on: `dynamic` takes 63 softmaxes and more for a token.
    """
    further = torch.cat([subject.blocks[d]["fuse"] for d in DOMAINS])
    old, parts = subject.folder / "base", {d: subject.folder / d for d in DOMAINS}
    start = subject.make("newer base", partial(load, old), further, **newer)
    subject.tests = {
        d: HeldOut(x.input_ids[:examples], x.attention_mask[:examples], x.scored[:examples])
        for d, x in subject.tests.items()
    }
    models: dict[str, Callable] = {
        "newer base": lambda: load(start),
        "plain gate of the specialists": lambda: subject.fused,
        "uniform mean of the specialists": lambda: UltraFuserForCausalLM.from_specialists(parts, gate="uniform"),
        **{_named(word): partial(_ported, start, old, parts, word) for word in words},
    }
    return {name: subject.losses(model()) for name, model in models.items()}


def _named(word: str) -> str:
    return word if ":" in word else f"signed, {word}"


def _ported(newer: Path, old: Path, tuned: dict[str, Path], word: str) -> UltraFuserForCausalLM:
    """Adds what tuning changed to a newer base, by one factor for all, or by a rule that finds factors."""
    if ":" in word:
        chosen: dict = {"fusion": word}
    else:
        factor = float(word)
        chosen = {"signed_weights": [1.0, *[factor] * len(tuned), -factor * len(tuned)]}
    return UltraFuserForCausalLM.from_specialists({"newer": newer, **tuned, "old": old}, gate="uniform", **chosen)


def _some(subject: Subject, model, domains: list[str]) -> Losses:
    return {d: mean_loss(model, subject.tests[d]) for d in domains}


def termed(subject: Subject, words: dict[str, dict]) -> dict[str, Losses]:
    """Trains the plain gate with further settings of stage one, by row."""
    return {name: subject.losses(subject.gate(**(more or {}))) for name, more in words.items()}


KINDS = {
    "sparsifiers": sparsified,
    "signed weights": signed,
    "several changes": together,
    "terms": termed,
    **published_gates.KINDS,
}


def measure(
    seed: int,
    work: Path,
    *,
    kind: str,
    words: list[str] | dict[str, dict],
    base: dict,
    specialist: dict,
    gate: str,
    fusion: str,
    stage: dict,
    examples_per_domain: int,
    more: dict | None = None,
) -> dict:
    """Measures strategies of one kind.

    Args:
        seed: As for `rivals` of `baseline_runs`, and so are `work`, `base`, `specialist` and `examples_per_domain`.
        work: Folder for models.
        kind: A name in `KINDS`.
        words: The strategies.
        base: Steps and rate.
        specialist: Steps and rate.
        gate: Of the plain gate, as for `Fusions.gate`, and so are `fusion` and `stage`.
        fusion: A name in `FUSIONS`.
        stage: Settings of stage one.
        examples_per_domain: In every batch.
        more: Further arguments of the kind.

    Returns:
        Held-out nats per token by row and domain.
    """
    logging.disable_progress_bar()
    folder, lock = folder_of(seed, work, base, specialist)
    with lock:
        blocks, tokenizer, make = specialists_of(seed, folder, base, specialist)
        plain = {"gate": gate, "fusion": fusion, "stage": stage}
        subject = Subject(seed, folder, blocks, tokenizer, make, plain, examples_per_domain)
        return {"nats_per_token": KINDS[kind](subject, words, **(more or {}))}


def check(*, kind: str, words: list[str] | dict[str, dict], **gate) -> None:
    """Checks that the strategies exist, and the gate."""
    check_gate(**gate)
    if kind not in KINDS:
        raise ValueError(f"`kind` is one of {list(KINDS)}, but is {kind!r}.")
    if kind == "sparsifiers":
        for word in words:
            sparsifier(word)


RUNS = {"strategies": measure}
CHECKS = {"strategies": check}
