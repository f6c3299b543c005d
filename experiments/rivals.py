"""Is fusing worth it? Small specialists, everything that one could do with them instead, and what each is worth.

Text, code and mathematics are the quickstart's. All rivals read the same held-out tokens: those behind the first 32 of
each block, which routers may read. "Mixed" items change the domain every 64 tokens. What is trained is kept in the work
folder, and every contender's scores too, so that a run which is killed goes on where it was.
"""

import random
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from filelock import FileLock
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, set_seed
from transformers.utils import logging

from experiments.ledger import digest
from modeling_ultrafuser import UltraFuserForCausalLM
from trainers import GateStageConfig, GateTrainer, JointStageConfig, JointTrainer
from ultrafuser.corpora import DOMAINS, documents, splits
from ultrafuser.evaluation.comparing import MIXED, compare
from ultrafuser.evaluation.contenders import Comparison
from ultrafuser.evaluation.measuring import HeldOut, held_out
from ultrafuser.quickstart import LENGTH, new_model, pretrain, to_blocks, train_tokenizer


EXAMPLES = 48  # of each domain to measure on
TURN = 64  # tokens between changes of domain in a mixed item


def rivals(
    seed: int,
    work: Path,
    *,
    base: dict,
    specialist: dict,
    gate: dict,
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
        gate: Settings of stage one.
        joint: Settings of stage two.
        tuned: Steps and rate of the single models that are tuned on what the fused model is trained on.
        whole: Steps and rate of one model trained from scratch on all data with the compute of all of the above.
        examples_per_domain: In every batch of the stages.
    """
    logging.disable_progress_bar()
    asked = {"base": base, "specialist": specialist, "gate": gate, "joint": joint, "tuned": tuned, "whole": whole}
    folder = work / f"rivals-{seed}-{digest(asked)}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        blocks, tokenizer = corpora(seed, folder)
        make = partial(_made, folder, tokenizer)
        seen = torch.cat([blocks[d]["specialist"] for d in DOMAINS])
        fresh = torch.cat([blocks[d]["fuse"] for d in DOMAINS])
        everything = torch.cat([seen, fresh])

        start = make("base", lambda: new_model(tokenizer, seed), seen, **base, seed=seed)
        for d in DOMAINS:
            make(d, partial(_copy, start), blocks[d]["specialist"], **specialist, seed=seed)
        singles = {
            "one model, all data and compute": (lambda: new_model(tokenizer, seed), everything, whole),
            **{f"{d} specialist, tuned further": (partial(_load, folder / d), fresh, tuned) for d in DOMAINS},
        }
        if base["steps"]:
            singles["base, tuned on the same data"] = (partial(_copy, start), fresh, tuned)
        for name, (model, data, how) in singles.items():
            make(name, model, data, **how, seed=seed)

        stages = _Stages(folder, tokenizer, blocks, examples_per_domain, seed)
        one = stages.train("fused", GateTrainer, None, "fuse", gate)
        stages.train("fused, stage two", JointTrainer, "fused", "fuse", joint)
        stages.train("fused, stage two on the specialists' own data", JointTrainer, "fused", "specialist", joint)
        stages.train("fused, probability mixture", GateTrainer, None, "fuse", gate, fusion="probabilities")

    data = {d: _blocks(blocks[d]["held_out"][:EXAMPLES], tokenizer) for d in DOMAINS}
    data[MIXED] = _blocks(mixed({d: blocks[d]["held_out"] for d in DOMAINS}, seed, EXAMPLES), tokenizer)
    tune = {d: _blocks(blocks[d]["fuse"][:48], tokenizer) for d in DOMAINS}
    more = {name: partial(_load, folder / name) for name in (*singles, *stages.names[1:])}
    if base["steps"]:
        more["base"] = partial(_load, folder / "base")
    comparison = Comparison(one, one, tokenizer, data, tune, start, seed)
    return compare(comparison, folder, more=more, identity=asked | {"seed": seed})


def corpora(seed: int, folder: Path) -> tuple[dict[str, dict[str, Tensor]], AutoTokenizer]:
    """Blocks by domain and split, and the tokenizer, which is trained on what the specialists are trained on."""
    parts = {d: splits(documents(d, seed)) for d in DOMAINS}
    if not (folder / "tokenizer").exists():
        train_tokenizer([text for p in parts.values() for text in p["specialist"]]).save_pretrained(
            folder / "tokenizer"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return {d: {name: to_blocks(texts, tokenizer) for name, texts in parts[d].items()} for d in DOMAINS}, tokenizer


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


def _blocks(blocks: Tensor, tokenizer) -> HeldOut:
    return held_out([{"input_ids": row} for row in blocks.tolist()], tokenizer)


def _made(folder: Path, tokenizer, name: str, model, blocks: Tensor, *, steps: int, rate: float, seed: int):
    """A model from the folder, or made, trained and put there."""
    if not (folder / name / "config.json").exists():
        trained = model()
        if steps:
            # whole blocks of the domains in a random order, the same for all rivals that read the same
            order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
            pretrain(trained, blocks[order], folder / name, steps, rate, seed)
        trained.save_pretrained(folder / "part")
        tokenizer.save_pretrained(folder / "part")
        (folder / "part").rename(folder / name)
    return _load(folder / name)


def _load(folder: Path):
    kind = UltraFuserForCausalLM if "fused" in folder.name else AutoModelForCausalLM
    return kind.from_pretrained(folder)


def _copy(model: LlamaForCausalLM) -> LlamaForCausalLM:
    copied = type(model)(model.config)
    copied.load_state_dict(model.state_dict())
    return copied


class _Stages:
    """The stages of fused models, each once."""

    def __init__(self, folder: Path, tokenizer, blocks, examples_per_domain: int, seed: int):
        self.folder, self.tokenizer, self.blocks, self.seed = folder, tokenizer, blocks, seed
        self.shared = {
            "examples_per_domain": examples_per_domain,
            "per_device_train_batch_size": examples_per_domain * len(DOMAINS),
            "max_length": LENGTH,
            "bf16": False,
            "gradient_checkpointing": False,
            "seed": seed,
            **{"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True},
        }
        self.names: list[str] = []

    def train(self, name: str, trainer_class, start: str | None, split: str, settings: dict, **fusing):
        """Fuses, or goes on from another stage's folder, and trains on a split of every domain."""
        self.names.append(name)
        target = self.folder / name
        if not (target / "config.json").exists():
            set_seed(self.seed)
            if start is None:
                model = UltraFuserForCausalLM.from_specialists({d: self.folder / d for d in DOMAINS}, **fusing)
            else:
                model = _load(self.folder / start)
            rows = {d: self.blocks[d][split].tolist() for d in DOMAINS}
            data = {d: Dataset.from_dict({"input_ids": ids, "labels": ids}) for d, ids in rows.items()}
            config = GateStageConfig if trainer_class is GateTrainer else JointStageConfig
            arguments = config(str(self.folder / "stage"), **self.shared, **settings)
            trainer_class(model, arguments, data, processing_class=self.tokenizer).train()
            model.save_pretrained(self.folder / "part")
            self.tokenizer.save_pretrained(self.folder / "part")
            (self.folder / "part").rename(target)
        return _load(target)


RUNS = {"baselines": rivals}
