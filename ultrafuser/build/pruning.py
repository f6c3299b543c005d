"""Chooses which specialists of a fused model to keep, from one pass of all of them over held-out text.

A specialist reads the text by itself, whoever else is in the model. So what a model of some of them would predict follows
from hidden states that all of them have made once: its gate is what `remove_specialist` leaves, its fusion rule and its
columns of the head are the same. All subsets of one size are measured so, and the best one is written (exhaustive search
for the subset to keep, as Lu et al., 2024, arXiv 2402.14800, section 3.2, do it for the experts of a layer). The measure is the loss
on held-out text; or, as theirs, how far a subset's outputs are from those of all, which needs no good answers in the text.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from pathlib import Path

import torch
from rich.table import Column, Table
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM
from modeling_ultrafuser.evidence_ultrafuser import judged
from modeling_ultrafuser.forecasts_ultrafuser import accumulated
from modeling_ultrafuser.fusion_base_ultrafuser import Fusion, specialist_parts
from modeling_ultrafuser.fusions_ultrafuser import check_loss, fusion_class
from modeling_ultrafuser.gate_base_ultrafuser import Gate, GateOutput, Reads, run_before_specialists
from modeling_ultrafuser.inputs_ultrafuser import Tokens
from modeling_ultrafuser.refusals_ultrafuser import Refusal
from trainers.progress import Progress

from ..atomic import new_folder
from ..evaluation.held_out_files import check_domains, read_domains
from ..evaluation.measurement import LOGITS, HeldOut, mean_over_domains
from ..pretrained import fused_config, open_fused, read_ingredients, read_tokenizer, save_fused
from .specialist_edits import keep_in_gate, keep_specialists


MOST = 1000  # subsets: each is a gate, and a prediction of every token
ROWS = 16  # examples that are read at once
LOSS, DISTANCE = "loss", "distance"
MEASURES = (LOSS, DISTANCE)


@dataclass
class Subset:
    """Measure of a fused model of some of the specialists.

    Attributes:
        names: Names of the specialists.
        losses: By domain, on held-out text: its loss; or its distance, the Kullback-Leibler divergence of its predictions from
            those of all specialists. In nats per token.
    """

    names: tuple[str, ...]
    losses: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean over domains, without "mixed"."""
        return mean_over_domains(self.losses)


def prune(
    folder: Path,
    keep: int,
    data: Mapping[str, str],
    out: Path,
    *,
    examples: int = 200,
    max_length: int = 1024,
    prompt_tokens: int = 32,
    by: str = LOSS,
) -> list[Subset]:
    """Writes a fused folder of the specialists whose loss on held-out text, or distance, is the least without the others.

    Args:
        folder: Folder of a fused model.
        keep: Number of specialists to keep.
        data: Held-out data by domain, see `read_domains`.
        out: Folder to write.
        examples: Most examples of each domain.
        max_length: Longer examples are cut, in tokens; to the model's context if that is shorter.
        prompt_tokens: First tokens of plain text, which are not scored.
        by: One of `MEASURES`.

    Returns:
        All specialists, then each subset of this size, the best first.

    Raises:
        ValueError: If so many cannot be kept, there is no such measure, or a row of the data is malformed: before any weight
            is loaded.
        FileExistsError: If there is something in `out`.
        OSError: If the model or data cannot be read.
    """
    config = fused_config(folder)
    check_loss(config)
    check_number(config.specialist_names, keep)
    if by not in MEASURES:
        raise Refusal(
            f"subsets are to be compared by {by!r}",
            "They are by their loss, or by their distance from all specialists",
            f"Choose one of {list(MEASURES)}.",
        )
    check_domains(data)
    with new_folder(out) as part:
        tokenizer = read_tokenizer(folder)
        limits = {"max_length": min(max_length, config.max_position_embeddings or max_length)}
        held = read_domains(data, tokenizer, examples=examples, prompt_tokens=prompt_tokens, **limits)
        model, _ = open_fused(folder)
        subsets = rank_subsets(model, keep, held, by)
        names = subsets[min(1, len(subsets) - 1)].names
        ingredients = {n: i for n, i in read_ingredients(folder).items() if n in names}
        save_fused(part, keep_specialists(model, names), tokenizer, ingredients)
    return subsets


def check_number(names: Sequence[str], keep: int) -> None:
    """Rejects a number of specialists that cannot be kept.

    Raises:
        ValueError: If it is less than 2 or more than there are, or there are too many subsets of this size.
    """
    if keep < 2:
        raise Refusal(
            f"{keep} of {list(names)} is to be kept",
            "A fused model has at least two specialists",
            "Measure each alone, `ultrafuser evaluate`, and take one by itself: `ultrafuser specialist FOLDER NAME`.",
            about="specialists",
        )
    if keep > len(names):
        raise Refusal(
            f"{keep} specialists are to be kept, and there are {len(names)}: {list(names)}",
            "Pruning keeps some of them",
            "Keep fewer; `ultrafuser add` adds one.",
            about="specialists",
        )
    if comb(len(names), keep) > MOST:
        raise Refusal(
            f"of {len(names)} specialists there are {comb(len(names), keep):,} subsets of {keep}",
            f"Each is measured, at most {MOST:,}",
            "Prune in two steps and keep more in the first, or choose among the models: `ultrafuser pick`.",
            about="specialists",
        )


def rank_subsets(model: UltraFuserForCausalLM, keep: int, data: Mapping[str, HeldOut], by: str = LOSS) -> list[Subset]:
    """Measures all specialists of a model, and each subset of one size, in one pass of all over the data.

    Args:
        model: A fused model.
        keep: Number of specialists in a subset.
        data: Held-out examples by domain.
        by: One of `MEASURES`.

    Returns:
        All specialists, then the subsets, the best first. A subset that the gate has no weights for is missing.

    Raises:
        ValueError: If the gate has none for any.
    """
    check_loss(model.config)
    names = tuple(model.config.specialist_names)
    parts = [_Part.of(model, names)]
    errors = []
    for chosen in combinations(names, keep) if keep < len(names) else ():
        try:
            parts.append(_Part.of(model, chosen))
        except ValueError as error:
            errors.append(error)
    if len(parts) == 1 and errors:
        raise errors[0]
    losses = {domain: _losses(model, parts, examples, domain, by) for domain, examples in data.items()}
    every, *some = [Subset(p.config_names, {d: own[k] for d, own in losses.items()}) for k, p in enumerate(parts)]
    return [every, *sorted(some, key=lambda subset: subset.mean)]


@dataclass
class _Part:
    """A fused model of some of the specialists, without them.

    Attributes:
        indices: Indices of the specialists in the whole model.
        config: Its configuration.
        gate: Its gate.
        fusion: Its fusion rule.
    """

    indices: list[int]
    config: UltraFuserConfig
    gate: Gate
    fusion: Fusion

    @classmethod
    def of(cls, model: UltraFuserForCausalLM, names: Sequence[str]) -> "_Part":
        config, gate = keep_in_gate(model, names)
        indices = [model.config.specialist_names.index(name) for name in names]
        return cls(indices, config, gate, fusion_class(config.fusion)(config))

    @property
    def config_names(self) -> tuple[str, ...]:
        return tuple(self.config.specialist_names)

    def weigh(self, ids: Tensor, states: list[Tensor], past: tuple[Tensor, Tensor] | None) -> GateOutput:
        """Runs the gate on what all specialists have made. Shapes (batch, seq, hidden)."""
        evidence = ()
        if past is not None:
            log_probs, follows = past
            evidence = (accumulated(log_probs[..., self.indices], follows, follows, self.gate.evidence),)
        first = run_before_specialists(self.gate, ids)
        return first or self.gate([states[k] for k in self.indices], *evidence)


@torch.inference_mode()
def _losses(model: UltraFuserForCausalLM, parts: list[_Part], data: HeldOut, domain: str, by: str) -> list[float]:
    """Returns the measure of each part on a domain, in nats per token that is predicted. The first part is the whole."""
    sums = torch.zeros(len(parts), dtype=torch.float64)
    starts = range(0, len(data), ROWS)
    with Progress(f"specialists read {domain}", len(starts)) as progress:
        for start in starts:
            sums += _summed_losses(model, parts, data[start : start + ROWS], by)
            progress.add()
    return (sums / data.scored.sum()).tolist()


def _summed_losses(model: UltraFuserForCausalLM, parts: list[_Part], data: HeldOut, by: str) -> Tensor:
    device = model.lm_head.weight.device
    ids, mask, scored = (t.to(device) for t in (data.input_ids, data.attention_mask, data.scored))
    outputs = model.model.reader.read(Tokens(ids, mask), None, use_cache=False)
    states = [output.last_hidden_state.to(device) for output in outputs]
    past = _past(model, ids, data.follows.to(device), states)
    # the prediction of a token is made one token earlier
    where, targets = scored[:, 1:], ids[:, 1:][scored[:, 1:]]
    weighed = []
    for part in parts:
        weights, scales = part.weigh(ids, states, past)
        weighed.append([None if t is None else t[:, :-1][where] for t in (weights, scales)])
    states = [h[:, :-1][where] for h in states]
    sums = torch.zeros(len(parts), dtype=torch.float64)
    for chunk in _chunks(len(targets), model.config):
        logits = [F.linear(h[chunk], columns) for h, columns in zip(states, _heads(model), strict=True)]
        whole = None
        for k, (part, numbers) in enumerate(zip(parts, weighed, strict=True)):
            own = (None if t is None else t[chunk] for t in numbers)
            fused = part.fusion.fused([logits[i] for i in part.indices], *own)
            if by == LOSS:
                sums[k] += F.cross_entropy(fused, targets[chunk], reduction="sum").item()
                continue
            fused = fused.float().log_softmax(-1)
            whole = fused if k == 0 else whole
            sums[k] += F.kl_div(fused, whole, log_target=True, reduction="sum").item()
    return sums


def _past(model: UltraFuserForCausalLM, ids: Tensor, follows: Tensor, states: list[Tensor]) -> tuple | None:
    """Computes what a gate that reads the past needs: see `read_evidence`, of texts without a cache.

    Returns:
        Log-probabilities of the tokens, shape (batch, seq, specialists), and `follows`; or None.
    """
    if Reads.PAST not in model.model.fusion_gate.reads:
        return None
    earlier = F.pad(torch.cat(states, -1)[:, :-1], (0, 0, 1, 0))
    return judged(specialist_parts(earlier, model.config), ids[:, None], model.lm_head.weight), follows


def _heads(model: UltraFuserForCausalLM) -> Iterator[Tensor]:
    return (model.lm_head.weight[:, columns] for columns in model.head_columns())


def _chunks(tokens: int, config: UltraFuserConfig) -> list[slice]:
    """Cuts tokens such that the logits of all specialists, and those that are made of them, fit into `LOGITS`."""
    size = max(1, LOGITS // (config.vocab_size * (len(config.specialists) + 4)))
    return [slice(start, start + size) for start in range(0, tokens, size)]


def table(subsets: list[Subset], by: str = LOSS) -> Table:
    """Shows all subsets, all specialists first, then the best first."""
    what = "nats per token" if by == LOSS else "divergence from the predictions of all, nats per token"
    domains = list(subsets[0].losses)
    numbers = [Column(name, justify="right", no_wrap=True) for name in (*domains, "mean", "to all")]
    shown = Table("specialists", *numbers, caption=f"{what}, held out, before the gate is trained again")
    for subset in subsets:
        losses = [f"{loss:.4f}" for loss in (*subset.losses.values(), subset.mean)]
        difference = "" if subset is subsets[0] else f"{subset.mean - subsets[0].mean:+.4f}"
        shown.add_row(", ".join(subset.names), *losses, difference)
    return shown
