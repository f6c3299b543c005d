"""Is fusing worth it? Small specialists, everything that one could do with them instead, and what each is worth.

Text, code and mathematics are the quickstart's. All rivals read the same held-out tokens: those behind the first 32 of
each block, which routers may read. "Mixed" items change the domain every 64 tokens. What is trained is kept in the work
folder, and every contender's scores too, so that a run which is killed goes on where it was. Settings of gates are chosen
(`choose`) on a part of the text to fuse with, never on held-out tokens.
"""

import json
import random
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from filelock import FileLock
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, set_seed
from transformers.utils import logging

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.fusions_ultrafuser import FUSIONS
from modeling_ultrafuser.gate_base_ultrafuser import Reads
from modeling_ultrafuser.gates_ultrafuser import GATES, gate_settings
from trainers import CachedGateTrainer, GateStageConfig, JointStageConfig, JointTrainer
from trainers.heads import head_of
from ultrafuser.evaluation.comparison import compare_models
from ultrafuser.evaluation.contenders import FUSED, Comparison, Measured, best_per_domain
from ultrafuser.evaluation.measurement import MIXED, HeldOut, held_out, score
from ultrafuser.evaluation.resampling import interval, per_example
from ultrafuser.provenance import digest
from ultrafuser.quickstart.corpora import DOMAINS, documents, splits
from ultrafuser.quickstart.toy_models import LENGTH, new_model, pretrain, to_blocks, train_tokenizer


EXAMPLES = 48  # of each domain to measure on
TURN = 64  # tokens between changes of domain in a mixed item
ORACLE = "best specialist per domain (oracle)"
# rows that others are compared with, token by token
REFERENCES = (ORACLE, f"{ORACLE}, a temperature per token", "router: prompt perplexity", FUSED)
FORECASTER = "fixed-share forecaster"
STAGE_TWO = "stage two"
PLAIN = {"max_length": LENGTH, "bf16": False, "gradient_checkpointing": False}
PLAIN |= {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}


def rivals(
    seed: int,
    work: Path,
    *,
    base: dict,
    specialist: dict,
    gates: dict[str, dict],
    joint: dict,
    tuned: dict,
    whole: dict,
    examples_per_domain: int,
) -> dict:
    """Trains all that is to be trained, and compares.

    Args:
        seed: Of corpora, tokenizer, first weights, data order and controls.
        work: Folder for models and scores.
        base: Steps and rate of the model that all specialists are tuned from, on all domains; 0 steps: random weights.
        specialist: Steps and rate of each specialist on its own domain.
        gates: Fused models by the name of their row, "fused" among them, as `Fusions.gate` takes them.
        joint: `after`, the rows of `gates` that stage two goes on from, and `stage`, its settings.
        tuned: Steps and rate of the single models that are tuned on what the fused model is trained on.
        whole: Steps and rate of one model trained from scratch on all data with the compute of all of the above.
        examples_per_domain: In every batch of the stages.
    """
    logging.disable_progress_bar()
    folder, lock = folder_of(seed, work, base, specialist)
    with lock:
        blocks, tokenizer, make = specialists_of(seed, folder, base, specialist)
        fresh = torch.cat([blocks[d]["fuse"] for d in DOMAINS])
        everything = torch.cat([*(blocks[d]["specialist"] for d in DOMAINS), fresh])
        singles = {
            "one model, all data and compute": (lambda: new_model(tokenizer, seed), everything, whole),
            **{f"{d} specialist, tuned further": (partial(load, folder / d), fresh, tuned) for d in DOMAINS},
        }
        if base["steps"]:
            singles["base, tuned on the same data"] = (partial(load, folder / "base"), fresh, tuned)
        singles = {name: make(name, model, data, **how) for name, (model, data, how) in singles.items()}

        data = {d: blocks[d]["fuse"] for d in DOMAINS}
        fusions = Fusions(folder, tokenizer, data, examples_per_domain, seed)
        models = {name: fusions.gate(**how) for name, how in gates.items()}
        for name in joint["after"]:
            models[f"{name}, {STAGE_TWO}"] = fusions.joint(models[name], data, joint["stage"])
        own = {d: blocks[d]["specialist"] for d in DOMAINS}
        models[f"{FUSED}, {STAGE_TWO} on the specialists' own data"] = fusions.joint(
            models[FUSED], own, joint["stage"]
        )

    files = {**singles, **models} | ({"base": folder / "base"} if base["steps"] else {})
    comparison = _comparison(folder, files.pop(FUSED), blocks, tokenizer, seed)
    identity = {"base": base, "specialist": specialist, "gates": gates, "joint": joint, "tuned": tuned, "whole": whole}
    out = folder / f"compared-{digest(identity)}"
    found = compare_models(comparison, out, more={n: partial(load, f) for n, f in files.items()}, identity=identity)
    return found | {"against": against(comparison)}


def choose(
    seed: int,
    work: Path,
    *,
    settings: dict[str, dict],
    kept_out: float,
    gate: str,
    fusion: str,
    stage: dict | None,
    examples_per_domain: int,
    share: float = 1.0,
) -> dict:
    """Trains one gate in every setting on a part of the text to fuse with, and measures it on the other.

    Args:
        seed: As for `rivals`.
        work: Folder for models.
        settings: `base` and `specialist` by name of the setting, as `rivals` takes them.
        kept_out: Share of each domain's blocks to fuse with that nothing is trained on.
        gate: As for `Fusions.gate`, and so are `fusion` and `stage`.
        examples_per_domain: In every batch.
        share: Share of the blocks to train on that it is trained on.

    Returns:
        Nats per token by setting and domain: of the gate, and of the best specialist of each domain.
    """
    logging.disable_progress_bar()
    found: dict[str, dict] = {"nats_per_token": {}, "oracle": {}}
    for name, how in settings.items():
        folder, lock = folder_of(seed, work, **how)
        with lock:
            blocks, tokenizer, _ = specialists_of(seed, folder, **how)
            kept = {d: round((1 - kept_out) * len(blocks[d]["fuse"])) for d in DOMAINS}
            data = {d: blocks[d]["fuse"][: round(share * kept[d])] for d in DOMAINS}
            tests = {d: blocks[d]["fuse"][kept[d] :] for d in DOMAINS}
            tests[MIXED] = mixed(tests, seed, EXAMPLES)
            fusions = Fusions(folder, tokenizer, data, examples_per_domain, seed)
            model = load(fusions.gate(gate, fusion, stage))
            tests = {d: examples_of(rows, tokenizer) for d, rows in tests.items()}
            found["nats_per_token"][name] = {d: loss_of(model, x) for d, x in tests.items()}
            found["oracle"][name] = _oracle(folder, tests)
    return found


def corpora(seed: int, folder: Path) -> tuple[dict[str, dict[str, Tensor]], AutoTokenizer]:
    """Blocks by domain and split, and the tokenizer, which is trained on what the specialists are trained on."""
    if not (folder / "blocks.pt").exists():
        parts = {d: splits(documents(d, seed)) for d in DOMAINS}
        tokenizer = train_tokenizer([text for p in parts.values() for text in p["specialist"]])
        tokenizer.save_pretrained(folder / "tokenizer")
        blocks = {d: {name: to_blocks(texts, tokenizer) for name, texts in parts[d].items()} for d in DOMAINS}
        torch.save(blocks, folder / "blocks.partial")
        (folder / "blocks.partial").rename(folder / "blocks.pt")
    return torch.load(folder / "blocks.pt"), AutoTokenizer.from_pretrained(folder / "tokenizer")


def mixed(blocks: dict[str, Tensor], seed: int, items: int) -> Tensor:
    """Items that change the domain every `TURN` tokens. Shape (items, LENGTH)."""
    rng = random.Random(seed)
    made = []
    for _ in range(items):
        domains = rng.sample(DOMAINS, len(DOMAINS))
        turns = [domains[turn % len(DOMAINS)] for turn in range(LENGTH // TURN)]
        starts = [rng.randrange(LENGTH // TURN) * TURN for _ in turns]
        pieces = [blocks[d][rng.randrange(len(blocks[d]))][s : s + TURN] for d, s in zip(turns, starts, strict=True)]
        made.append(torch.cat(pieces))
    return torch.stack(made)


def examples_of(blocks: Tensor, tokenizer) -> HeldOut:
    return held_out([{"input_ids": row} for row in blocks.tolist()], tokenizer)


def folder_of(seed: int, work: Path, base: dict, specialist: dict) -> tuple[Path, FileLock]:
    """Folder of specialists and all that is made of them, which one process at a time holds."""
    folder = work / f"rivals-{seed}-{digest([base, specialist])}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder, FileLock(f"{folder}.lock")


def specialists_of(seed: int, folder: Path, base: dict, specialist: dict):
    """Base and specialists, made unless they are there.

    Returns:
        Blocks and tokenizer as `corpora` gives them, and `_made` for further single models.
    """
    blocks, tokenizer = corpora(seed, folder)
    make = partial(_made, folder, tokenizer, seed)
    seen = torch.cat([blocks[d]["specialist"] for d in DOMAINS])
    start = make("base", lambda: new_model(tokenizer, seed), seen, **base)
    for d in DOMAINS:
        make(d, partial(load, start), blocks[d]["specialist"], **specialist)
    return blocks, tokenizer, make


def _made(folder: Path, tokenizer, seed: int, name: str, model, blocks: Tensor, *, steps: int, rate: float) -> Path:
    """The folder of a single model, which is trained unless it is there."""

    def trained() -> LlamaForCausalLM:
        new = model()
        if steps:
            # whole blocks of the domains in a random order, the same for all rivals that read the same
            order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
            pretrain(new, blocks[order], folder / name, steps, rate, seed)
        return new

    # base and specialists are what the folder is named after
    target = folder / (name if name in ("base", *DOMAINS) else f"{name} {digest([steps, rate])}")
    return kept(target, trained, tokenizer)


def kept(target: Path, make, tokenizer) -> Path:
    """A model's folder, which is written whole or not at all: a trainer that was killed may have left an empty one."""
    if not (target / "config.json").exists():
        part = target.parent / "part"
        make().save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(target)
    return target


def load(folder: Path):
    fused = json.loads((folder / "config.json").read_text())["model_type"] == "ultrafuser"
    return (UltraFuserForCausalLM if fused else AutoModelForCausalLM).from_pretrained(folder)


class Fusions:
    """Fused models, each made once, of the specialists of one folder.

    Args:
        folder: Of specialists.
        tokenizer: Theirs.
        data: Blocks by domain to train gates on. Of each domain there is a specialist.
        examples_per_domain: In every batch.
        seed: Of first weights and draws.
    """

    def __init__(self, folder: Path, tokenizer, data: dict[str, Tensor], examples_per_domain: int, seed: int):
        self.folder, self.tokenizer, self.data, self.seed = folder, tokenizer, data, seed
        self.size = {d: len(rows) for d, rows in data.items()}
        self.shared = {
            "examples_per_domain": examples_per_domain,
            "per_device_train_batch_size": examples_per_domain * len(data),
            "seed": seed,
            **PLAIN,
        }

    def gate(self, gate: str, fusion: str, stage: dict | None = None) -> Path:
        """A folder of a fused model after stage one.

        Args:
            gate: A word, see `gate_settings`.
            fusion: A name in `FUSIONS`.
            stage: Settings of stage one; None for a gate that has nothing to train.
        """

        def trained() -> UltraFuserForCausalLM:
            set_seed(self.seed)
            parts = {d: self.folder / d for d in self.data}
            model = UltraFuserForCausalLM.from_specialists(parts, gate=gate, fusion=fusion)
            if stage is not None:
                self.train(model, stage)
            return model

        return kept(self.folder / f"fused {digest([self.size, gate, fusion, stage])}", trained, self.tokenizer)

    def train(self, model: UltraFuserForCausalLM, stage: dict) -> None:
        """Stage one, from a cache that is kept."""
        config = model.config
        keep = next(iter(head_of(config).kinds()))
        what = [
            config.specialist_names,
            self.size,
            keep,
            stage.get("mixed_share"),
            Reads.PAST in GATES[config.gate].reads,
        ]
        arguments = GateStageConfig(str(self.folder / "stage"), **self.shared, **stage)
        CachedGateTrainer(
            model,
            arguments,
            rows_of(self.data),
            processing_class=self.tokenizer,
            cache=self.folder / f"cache-{digest(what)}",
            keep=keep,
        ).train()

    def joint(self, start: Path, data: dict[str, Tensor], stage: dict) -> Path:
        """A folder of a fused model after stage two.

        Args:
            start: Folder of one after stage one.
            data: Blocks by domain.
            stage: Settings.
        """

        def trained() -> UltraFuserForCausalLM:
            set_seed(self.seed)
            model = load(start)
            arguments = JointStageConfig(str(self.folder / "stage"), **self.shared, **stage)
            JointTrainer(model, arguments, rows_of(data), processing_class=self.tokenizer).train()
            return model

        sizes = {d: len(rows) for d, rows in data.items()}
        return kept(self.folder / f"fused {digest([start.name, sizes, stage])}", trained, self.tokenizer)


def _comparison(folder: Path, fused: Path, blocks, tokenizer, seed: int) -> Comparison:
    """Collects what all models are measured on, and tuned on."""
    data = {d: examples_of(blocks[d]["held_out"][:EXAMPLES], tokenizer) for d in DOMAINS}
    data[MIXED] = examples_of(mixed({d: blocks[d]["held_out"] for d in DOMAINS}, seed, EXAMPLES), tokenizer)
    tune = {d: blocks[d]["fuse"][:EXAMPLES] for d in DOMAINS}
    tune = {d: examples_of(rows, tokenizer) for d, rows in {**tune, MIXED: mixed(tune, seed, EXAMPLES)}.items()}
    one = load(fused)
    return Comparison(one, one, tokenizer, data, tune, load(folder / "base"), seed)


def rows_of(blocks: dict[str, Tensor]) -> dict[str, Dataset]:
    rows = {d: part.tolist() for d, part in blocks.items()}
    return {d: Dataset.from_dict({"input_ids": ids, "labels": ids}) for d, ids in rows.items()}


def against(comparison: Comparison) -> dict[str, dict[str, dict]]:
    """Tables the distance of fused models from the rows of `REFERENCES`, in nats per token; below 0 is better.

    Returns:
        By reference and row: `difference` by domain, the `interval` of its mean over domains, mixed items left out, and
        the `mixed_interval`.
    """
    told = [n for n, m in comparison.found.items() if m.kind == "fused" or n in (*REFERENCES, FORECASTER)]
    return {
        reference: {n: _difference(comparison, comparison.found[n], comparison.found[reference]) for n in told}
        for reference in REFERENCES
    }


def _difference(comparison: Comparison, row: Measured, reference: Measured) -> dict:
    paired = {}
    for domain, examples in comparison.data.items():
        sums, counts = per_example(row.scores[domain], examples)
        paired[domain] = (sums - per_example(reference.scores[domain], examples)[0], counts)
    found = {"difference": {d: float(sums.sum() / counts.sum()) for d, (sums, counts) in paired.items()}}
    changing = paired.pop(MIXED)
    ends = {"interval": list(paired.values()), "mixed_interval": [changing]}
    return found | {name: interval(pairs, seed=comparison.seed) for name, pairs in ends.items()}


def _oracle(folder: Path, tests: dict[str, HeldOut]) -> dict[str, float]:
    """Loss of the best specialist by domain."""
    scores = {d: {n: score(load(folder / n), x) for n in DOMAINS} for d, x in tests.items()}
    best = {d: DOMAINS[int(best_per_domain(scores[d], x)[0])] for d, x in tests.items()}
    return {d: _mean(scores[d][best[d]].losses, x) for d, x in tests.items()}


def loss_of(model, test: HeldOut) -> float:
    return _mean(score(model, test).losses, test)


def _mean(losses: Tensor, test: HeldOut) -> float:
    return losses[test.scored].mean().item()


def check(*, gates: dict[str, dict], joint: dict, **_) -> None:
    """Checks that all gates exist."""
    if not {FUSED, *joint["after"]} <= set(gates):
        raise ValueError(f"`gates` must have {FUSED!r} and all of `joint: after:`, but has {list(gates)}.")
    for how in gates.values():
        check_gate(**how)
    JointStageConfig("nowhere", **PLAIN, **joint["stage"])


def check_gate(*, gate: str, fusion: str, stage: dict | None = None, **_) -> None:
    """Checks that a gate exists, with settings that stage one takes."""
    gate_settings(gate)
    if fusion not in FUSIONS:
        raise ValueError(f"`fusion` is one of {list(FUSIONS)}, but is {fusion!r}.")
    GateStageConfig("nowhere", **PLAIN, **(stage or {}))


RUNS = {"baselines": rivals, "settings": choose}
CHECKS = {"baselines": check, "settings": check_gate}
