"""Picks specialists to fuse from a pool of more than fit into memory, by what each predicts alone.

A mixture of probabilities with the weights of the "posterior" gate follows from the probabilities that the specialists give
the tokens that come. So each specialist is read once, one after another, and keeps one number per token. Then the best
next specialist is picked, again and again (greedy forward selection; of ensembles Caruana et al., 2004). The first one is
the best alone, a generalist, which a set of specialists may not need: so picked ones are exchanged for others as long as
that lowers the loss.
"""

import gc
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from rich.table import Column, Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from modeling_ultrafuser import common_tokenizer
from modeling_ultrafuser.forecasts_ultrafuser import accumulated
from modeling_ultrafuser.fusing_ultrafuser import load_specialist
from modeling_ultrafuser.fusions_ultrafuser import FUSIONS
from modeling_ultrafuser.gate_base_ultrafuser import Evidence
from modeling_ultrafuser.gates_ultrafuser import gate_settings
from modeling_ultrafuser.plan_base_ultrafuser import FusionPlan
from modeling_ultrafuser.plan_ultrafuser import run_checks
from modeling_ultrafuser.refusals_ultrafuser import Refusal

from ..atomic import sole_writer, write_json
from ..check.plan_files import MetadataFiles
from ..evaluation.held_out_files import check_domains, read_domains
from ..evaluation.measurement import HeldOut, mean_over_domains, score
from ..provenance import digest, provenance, weights_digest


GATE, FUSION = "posterior", "probabilities"
SCORES, RESULTS = "scores", "results.json"
LEAST_GAIN = 1e-6  # nats per token that an exchange must bring: rounding is no reason


@dataclass
class Pick:
    """A specialist, and the loss of it and all that were picked before it.

    Attributes:
        name: Name of the specialist.
        losses: Nats per token by domain, on held-out text.
        picked: False if it was left, in which case the losses are those that picking it next would give.
    """

    name: str
    losses: dict[str, float]
    picked: bool = True

    @property
    def mean(self) -> float:
        """Mean over domains, without "mixed"."""
        return mean_over_domains(self.losses)


def pick(
    pool: Mapping[str, tuple[str, str | None]],
    keep: int,
    data: Mapping[str, str],
    out: Path,
    *,
    dtype: str = "auto",
    examples: int = 200,
    max_length: int = 1024,
    prompt_tokens: int = 32,
    say: Callable[[str], None] = print,
) -> list[Pick]:
    """Picks specialists that predict held-out text best together. Holds one in memory at a time.

    Args:
        pool: Name to folder or Hub id, and revision or None. They must be such as can be fused.
        keep: Number of specialists to pick.
        data: Held-out data by domain, see `read_domains`.
        out: Folder for what each specialist has predicted, and `results.json`. A run that was killed goes on there, and
            so does one with more specialists in the pool.
        dtype: dtype of the specialists. Default: the one that all share.
        examples: Most examples of each domain.
        max_length: Longer examples are cut, in tokens; to the shortest context if that is shorter.
        prompt_tokens: First tokens of plain text, which are not scored.
        say: Called with a line about each specialist.

    Returns:
        The picked ones in their order, then the others, the best first.

    Raises:
        ValueError: If they cannot be fused, so many cannot be picked, or a row of the data is malformed: before any
            weight is loaded.
        OSError: If a specialist or data cannot be read.
    """
    check_number(list(pool), keep)
    check_domains(data)
    plan = _checked(pool, dtype)
    revisions = {name: hub["revision"] for name, hub in plan.hub.items()}
    tokenizer = common_tokenizer(
        plan.specialists, chat_template=next(iter(pool)), revisions=revisions, vocab_size=plan.vocab_size
    )
    limits = {"max_length": min(max_length, plan.config.max_position_embeddings or max_length)}
    held = read_domains(data, tokenizer, examples=examples, prompt_tokens=prompt_tokens, **limits)
    with sole_writer(out, "pick", (SCORES, RESULTS)):
        log_probs = {}
        for k, name in enumerate(pool, 1):
            say(f"{name} ({k} of {len(pool)}): {pool[name][0]}")
            log_probs[name] = _log_probs(plan, name, held, out / SCORES)
        picks = choose(log_probs, held, keep)
        config = {"pool": dict(pool), "data": dict(data), "prompt_tokens": prompt_tokens, **limits}
        write_json(out / RESULTS, {**provenance(), "config": config, "picks": [asdict(p) for p in picks]})
    return picks


def check_number(names: list[str], keep: int) -> None:
    """Rejects a number of specialists that cannot be picked.

    Raises:
        ValueError: If it is less than 2, or more than there are.
    """
    if not 2 <= keep <= len(names):
        raise Refusal(
            f"{keep} of {names} is to be picked",
            "A fused model has at least two specialists, at most all of the pool",
            f"Pick 2 to {len(names)}, or put more into the pool.",
            about="specialists",
        )


def _checked(pool: Mapping[str, tuple[str, str | None]], dtype: str) -> FusionPlan:
    """Returns the plan of fusing the whole pool, all of whose checks have passed without weights."""
    hub = {name: {"revision": revision} for name, (_, revision) in pool.items()}
    choices = {**gate_settings(GATE), "fusion": FUSION}
    places = {name: location for name, (location, _) in pool.items()}
    plan = FusionPlan(places, hub, choices, dtype=dtype, files=MetadataFiles())
    for _ in run_checks(plan):
        pass
    if plan.adapters is not None:
        raise Refusal(
            f"{list(pool)} are adapters of one base",
            "A pool is read one model after another, but adapters are small and share their base",
            "Fuse all of them, train the gate, and choose with `ultrafuser prune`.",
            about="adapters",
        )
    return plan


def _log_probs(plan: FusionPlan, name: str, data: Mapping[str, HeldOut], folder: Path) -> dict[str, Tensor]:
    """Returns a specialist's log-probability of each token by domain, from a file or made and written there whole."""
    location, revision = plan.whole[name], plan.places[name]["revision"]
    print_of_data = [_fingerprint(examples) for examples in data.values()]
    made_of = [location, revision, weights_digest(Path(location)), str(plan.dtype), plan.vocab_size, print_of_data]
    file = folder / f"{name}-{digest(made_of)}.safetensors"
    if not file.exists():
        folder.mkdir(exist_ok=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_specialist(name, location, plan.configs[name], plan.dtype, **plan.places[name]).to(device)
        scores = {d: -score(model, examples, vocab_size=plan.vocab_size).losses for d, examples in data.items()}
        # of cycles in it, too, before the next one is loaded
        del model
        gc.collect()
        part = file.with_suffix(".part")
        save_file({d: t.contiguous() for d, t in scores.items()}, part, {"made_of": json.dumps(made_of)})
        os.replace(part, file)
    return load_file(file)


def _fingerprint(data: HeldOut) -> str:
    return digest([data.input_ids.tolist(), data.attention_mask.sum(-1).tolist()])


def choose(log_probs: Mapping[str, Mapping[str, Tensor]], data: Mapping[str, HeldOut], keep: int) -> list[Pick]:
    """Picks the specialist that lowers the mean loss most, again and again; then exchanges while that lowers it further.

    Args:
        log_probs: Log-probability of each token under each specialist, by specialist and domain. Shape (examples, seq).
        data: Held-out examples by domain.
        keep: Number of specialists to pick.

    Returns:
        The picked ones, each the best next one among them, then the others, the best first. The first in the pool wins a tie.
    """

    @cache
    def losses(names: frozenset[str]) -> dict[str, float]:
        return {d: mixture_loss([log_probs[n][d] for n in log_probs if n in names], x) for d, x in data.items()}

    def loss(names: Sequence[str]) -> float:
        return mean_over_domains(losses(frozenset(names)))

    def grown(names: list[str], pool: Sequence[str], number: int) -> list[str]:
        while len(names) < number:
            names = [*names, min((n for n in pool if n not in names), key=lambda n: loss([*names, n]))]
        return names

    picked = exchanged(grown([], list(log_probs), keep), list(log_probs), loss)
    order = grown([], [n for n in log_probs if n in picked], keep)
    left = sorted((n for n in log_probs if n not in picked), key=lambda n: loss([*picked, n]))
    picks = [Pick(name, losses(frozenset(order[: k + 1]))) for k, name in enumerate(order)]
    return picks + [Pick(name, losses(frozenset([*picked, name])), picked=False) for name in left]


def exchanged(picked: list[str], pool: list[str], loss: Callable[[list[str]], float]) -> list[str]:
    """Exchanges one name for another, the pair that lowers the loss most, until none does."""
    while True:
        pairs = [(out, new) for out in picked for new in pool if new not in picked]
        sets = [[new if name == out else name for name in picked] for out, new in pairs]
        best = min(sets, key=loss, default=picked)
        if loss(best) >= loss(picked) - LEAST_GAIN:
            return picked
        picked = best


def mixture_loss(log_probs: list[Tensor], data: HeldOut) -> float:
    """Returns the loss of the mixture of specialists' probabilities under the "posterior" gate, in nats per predicted token.

    Args:
        log_probs: Log-probability of each token under each specialist. Shapes (examples, seq).
        data: Held-out examples.
    """
    own = torch.stack(log_probs, -1)
    wanted = Evidence(switches=(FUSIONS[FUSION].switch_probability,))
    weights = accumulated(own, data.follows, data.follows, wanted)[..., 0].log_softmax(-1)
    # those of a token's prediction are known one token earlier
    mixed = (weights[:, :-1] + own[:, 1:]).logsumexp(-1)
    return -mixed[data.scored[:, 1:]].double().mean().item()


def table(picks: list[Pick]) -> Table:
    """Shows the picked ones in their order, then the others."""
    numbers = [Column(name, justify="right", no_wrap=True) for name in (*picks[0].losses, "mean")]
    shown = Table("", "specialist", *numbers, caption="nats per token, held out, of it and all picked before it")
    for k, one in enumerate(picks, 1):
        losses = [f"{loss:.4f}" for loss in (*one.losses.values(), one.mean)]
        shown.add_row(str(k) if one.picked else "left", one.name, *losses)
    return shown
