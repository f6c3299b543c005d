"""Stage one from one pass: frozen specialists run over the data once, and any number of gates is trained on that.

Specialists that do not move say the same of a token in every epoch. What a gate's loss needs of them is kept in files
that are mapped into memory:

- "log_probs", for mixtures of probabilities: each specialist's log-probability of the label. Exact; an epoch costs the
  gate alone.
- "hidden", for mixtures of logits: last hidden states, which are multiplied by the head again. Exact.
- "top", for mixtures of logits: the likeliest tokens, and a polynomial for the others (see `top_tokens`). An epoch costs
  little more than the gate.

The gate's own input is kept in all three: the last hidden states, and the evidence of a gate that reads the past.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from modeling_ultrafuser.families_ultrafuser import soft_cap
from modeling_ultrafuser.log_ultrafuser import print_line
from modeling_ultrafuser.outputs_ultrafuser import UltraFuserMixtureOutput

from .chunked import CHUNK, CHUNK_ELSEWHERE, scattered, score_tokens, specialist_log_probs
from .forward_hooks import capture
from .mix.rewards import REWARDS
from .stage_gate import GateTrainer
from .top_tokens import TOP, mixed_log_probs, summarised, terms


KEPT = {"logits": ("hidden", "top"), "probabilities": ("log_probs", "hidden")}  # by fusion rule, the default first
ADDED = ("log_probs", "top", "tail")  # to hidden states and labels, where they are kept
STATE, LOCK = "cache.json", ".lock"
SAMPLES = 1024  # values of each of the specialists' tensors that tell them from others


class GateCache:
    """What specialists say of every supervised token, one file per kind, row after row of the training data.

    Several processes may use one folder: one at a time makes it or adds to it, and the others read what is there.

    Args:
        folder: Made unless it is there.
        identity: What must be the same for files to be gone on with or used: a JSON object.
        counts: Supervised tokens of each row.
        fields: Shape per token and type of what is kept, by name.

    Raises:
        ValueError: If the folder holds another cache.
        OSError: If the disk has no room for it.
    """

    def __init__(self, folder: str | os.PathLike, identity: dict, counts: Sequence[int], fields: dict):
        self.folder, self.identity = Path(folder), identity
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        tokens = int(self.starts[-1])
        sizes = {name: tokens * int(np.prod(shape)) for name, (shape, _) in fields.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        # held until it says whose it is and all its room is taken, so that no other is begun in it
        with self.alone():
            if not self.complete:
                self._take_room({name: sizes[name] * dtype.itemsize for name, (_, dtype) in fields.items()})
                self._put_down()
        self.arrays = {
            name: torch.from_file(str(self.folder / f"{name}.bin"), shared=True, size=sizes[name], dtype=dtype).view(
                tokens, *shape
            )
            for name, (shape, dtype) in fields.items()
        }

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until no other process adds to the files, reads how far they are, and keeps others from it."""
        lock = FileLock(self.folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print_line(f"Another process is making the cache in {self.folder}: what it makes is used when it is done.")
            lock.acquire()
        try:
            self.rows_done = self._rows_there()
            yield
        finally:
            lock.release()

    def _rows_there(self) -> int:
        state = self.folder / STATE
        found = json.loads(state.read_text()) if state.exists() else {"rows_done": 0, **self.identity}
        for key, own in self.identity.items():
            if found.get(key) != own:
                raise ValueError(
                    f"A gate is trained on what its own specialists say of its own data, but {key} is {found.get(key)!r} "
                    f"in the cache {str(self.folder)!r} and {own!r} here. Choose another folder, or delete this one."
                )
        return found["rows_done"]

    def _take_room(self, sizes: dict[str, int]) -> None:
        """Takes all the room on the disk that the files will need: a disk that is full later would end the process."""
        whole, there = sum(sizes.values()), sum(path.stat().st_blocks * 512 for path in self.folder.glob("*.bin"))
        free = shutil.disk_usage(self.folder).free
        print_line(
            f"The cache of {int(self.starts[-1]):,} tokens in {self.folder} takes {_readable(whole)}; {_readable(free)} "
            f"are free."
        )
        if whole - there > free:
            raise OSError(
                f"A cache is written whole or not at all, but {str(self.folder)!r} is to hold {_readable(whole)} and its "
                f"disk has {_readable(free)} left. Choose another folder, fewer rows, a smaller `dtype`, or no cache."
            )
        for name, size in sizes.items():
            with (self.folder / f"{name}.bin").open("ab") as file:
                if size and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)

    @property
    def complete(self) -> bool:
        return self.rows_done == len(self.starts) - 1

    def write(self, rows: int, values: dict[str, Tensor]) -> None:
        """Puts down what is kept of the next `rows` rows. A process that is killed afterwards goes on behind them."""
        end = self.rows_done + rows
        place = slice(self.starts[self.rows_done], self.starts[end])
        for name, value in values.items():
            self.arrays[name][place] = value.cpu()
        self.rows_done = end
        self._put_down()

    def _put_down(self) -> None:
        partial = self.folder / f"{STATE}.partial"
        partial.write_text(json.dumps({"rows_done": self.rows_done, **self.identity}))
        os.replace(partial, self.folder / STATE)

    def places(self, rows: Iterable[int]) -> Tensor:
        """Where the rows' tokens are. Shape (tokens,)."""
        return torch.cat([torch.arange(self.starts[r], self.starts[r + 1]) for r in rows])


class CachedGateTrainer(GateTrainer):
    """`GateTrainer` that runs the specialists once over the data, then trains the gate on what they said.

    The same draws, steps, logs and checkpoints as `GateTrainer`'s, and, but for `keep="top"` and rounding, the same
    losses. The pass is made by `train()`; one that was killed goes on where it was, and whatever gate is trained next
    on the same specialists and data reads the same files. Specialists are read as at inference: a dropout that
    `GateTrainer` would leave on is off.

    Args:
        *args: As for `GateTrainer`.
        cache: Folder of the files.
        keep: "log_probs", "hidden" or "top". Default: the exact one of the fusion rule.
        dtype: Of hidden states in the files: torch.float32 or torch.bfloat16. Default: the specialists' own, which is
            exact.
        **kwargs: As for `GateTrainer`.

    Raises:
        ValueError: If the folder holds another cache, or a setting needs what is not in one.
        OSError: If the disk has no room.
    """

    extra_columns = ("domain", "row")

    def __init__(self, *args, cache: str | os.PathLike, keep: str | None = None, dtype=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.keep = _kept(self.fused.config)[0] if keep is None else keep
        self._check()
        self.rows = self._remove_unused_columns(self.train_dataset, description="training")
        dtype = dtype or next(self.fused.model.specialists.parameters()).dtype
        counts: list[int] = []
        gate = self.fused.model.fusion_gate
        identity = {
            "keep": self.keep,
            "dtype": str(dtype).removeprefix("torch."),
            "rows": _digest(self._counted(counts)),
            "specialists": _digest(_samples(self.fused)),
            # one made for a gate that reads the past serves all that do not
            **({"evidence": [list(numbers) for numbers in gate.evidence]} if gate.reads_past else {}),
        }
        self.cache = GateCache(cache, identity, counts, self._fields(dtype))
        # from here on an example is the place of its row
        self.train_dataset = Dataset.from_dict({"row": range(len(counts)), "domain": list(self.rows["domain"])})
        self.data_collator = _CachedRows(self.data_collator, self.cache, self.drawn)
        self._answer_from_cache()

    def _check(self) -> None:
        config, world = self.fused.config, self.args.world_size
        if self.keep not in _kept(config):
            calibrated = " and a calibrated gate" if config.gate_calibration else ""
            raise ValueError(
                f"For fusion={config.fusion!r}{calibrated} a cache keeps one of {list(_kept(config))}, but `keep` is "
                f"{self.keep!r}."
            )
        if self.keep == "top" and soft_cap(self.fused.config) is not None:
            raise ValueError("keep='top' sums logits that are not bounded once mixed. Use keep='hidden'.")
        if self.args.mix_reward is not None and not REWARDS[self.args.mix_reward].reads_cache:
            raise ValueError(
                f"A cache holds the training data alone, but mix_reward={self.args.mix_reward!r} runs the specialists on "
                f"the way. Use mix_reward='loss', or GateTrainer."
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or world > 1:
            raise ValueError(
                f"A gate trained from a cache takes one process, but there are {world}, or weights in parts. Train it "
                f"without `accelerate launch`."
            )

    def _counted(self, counts: list[int]) -> Iterable[Tensor]:
        """All that a row is read as, row after row; fills in how many supervised tokens each has."""
        for row in self.rows:
            batch = self.data_collator([row])
            counts.append((batch["labels"][:, 1:] != -100).sum().item())
            yield from (torch.as_tensor(value) for _, value in sorted(batch.items()))

    def _fields(self, dtype: torch.dtype) -> dict:
        widths = [c.hidden_size for c in self.fused.config.specialists]
        number, vocab = len(widths), self.fused.config.vocab_size
        fields = {"targets": ((), torch.int64), "states": ((sum(widths),), dtype)}
        if self.fused.model.fusion_gate.reads_past:
            fields["evidence"] = ((number, sum(map(len, self.fused.model.fusion_gate.evidence))), torch.float32)
        if self.keep != "hidden":
            fields["log_probs"] = ((number,), torch.float32)
        if self.keep == "top":
            fields["top"] = ((number * min(TOP, vocab), number), torch.float32)
            fields["tail"] = ((terms(number),), torch.float32)
        return fields

    # ---- the pass

    def train(self, *args, **kwargs):
        """As `GateTrainer.train`, after what is missing of the pass."""
        self.fill()
        return super().train(*args, **kwargs)

    def fill(self) -> None:
        """Makes what is missing of the pass."""
        if self.cache.complete:
            return
        training, size = self.fused.training, self.args.per_device_train_batch_size
        self.fused.eval()
        with self.cache.alone():
            while not self.cache.complete:
                first = self.cache.rows_done
                rows = range(first, min(first + size, len(self.rows)))
                self.cache.write(len(rows), self._said_of(rows))
        self.fused.train(training)

    @torch.no_grad()
    def _said_of(self, rows: Iterable[int]) -> dict[str, Tensor]:
        """What is kept of some rows' supervised tokens."""
        batch = self._prepare_inputs(self.data_collator.collator([self.rows[i] for i in rows]))
        batch.pop("domain")
        labels = batch.pop("labels")[:, 1:]
        mask = labels != -100
        with capture(self.fused, own=True) as seen, self.accelerator.autocast():
            self.fused.model(**batch, use_cache=False, return_dict=True)
            states, targets = [h[:, :-1][mask] for h in seen["hidden_states"]], labels[mask]
            said = {"targets": targets, "states": torch.cat(states, -1)}
            for evidence in seen["evidence"]:
                said["evidence"] = evidence[:, :-1][mask]
            weight = self.fused.lm_head.weight
            heads = [weight[:, columns] for columns in self.fused.head_columns()]
            caps = [soft_cap(c) for c in self.fused.config.specialists]
            parts = list(zip(states, heads, caps, strict=True))
            if self.keep == "log_probs":
                said["log_probs"] = torch.stack(
                    [specialist_log_probs(h, head, targets, cap) for h, head, cap in parts], -1
                )
            elif self.keep == "top":
                said |= _top_of(states, heads, targets)
        return said

    # ---- training on it

    def _answer_from_cache(self) -> None:
        """Lets model and backbone answer for places in the cache as they would for the tokens that are there."""
        fused, backbone, arrays = self.fused, self.fused.model, self.cache.arrays
        ordinary, run = fused.forward, backbone.forward
        widths = [c.hidden_size for c in fused.config.specialists]

        # `generate` asks what they take
        @wraps(run)
        def read(*args, cached=None, **kwargs):
            if cached is None:
                return run(*args, **kwargs)
            states, *evidence = (
                arrays[name][cached.cpu()].to(self.args.device) for name in ("states", "evidence") if name in arrays
            )
            weights, scales = backbone.fusion_gate(states.split(widths, -1), *evidence)
            return UltraFuserMixtureOutput(states, gate_weights=weights, logit_scales=scales)

        @wraps(ordinary)
        def forward(*args, cached=None, labels=None, **kwargs):
            if cached is None:
                return ordinary(*args, labels=labels, **kwargs)
            outputs = backbone(cached=cached)  # as a module, so that what watches it sees it
            states, weights, scales = (
                None if output is None else output[0, :-1]
                for output in (outputs.specialist_hidden_states, outputs.gate_weights, outputs.logit_scales)
            )
            scores = self._scores(cached[0, :-1].cpu(), states, weights, scales, labels[0, 1:])
            return scattered(labels[:, 1:] != -100, *scores)

        backbone.forward, fused.forward = read, forward

    def _scores(
        self, places: Tensor, states: Tensor, weights: Tensor, scales: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, ...]:
        if self.keep == "hidden":
            config, head = self.fused.config, self.fused.lm_head.weight
            rule = self.fused.model.fusion_rule
            mixed = rule(states.split([c.hidden_size for c in config.specialists], -1), weights, scales)
            factors = rule.factors(weights, scales) if rule.one_head else weights
            return score_tokens(config, mixed, factors, head, targets, gate_only=True)
        kept = [self.cache.arrays[name][places].to(weights.device) for name in ADDED if name in self.cache.arrays]
        if self.keep == "top":
            log_probs = mixed_log_probs(weights, *kept)
        else:
            log_probs = (weights.clamp(min=torch.finfo(weights.dtype).tiny).log() + kept[0]).logsumexp(-1)
        # what only the whole vocabulary could tell: see `log`
        return log_probs, torch.zeros_like(log_probs), torch.zeros_like(targets, dtype=torch.bool)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `GateTrainer.log`, without what only all of the vocabulary could tell."""
        if self.keep != "hidden" and self.model.training:
            for name in ("entropy", "mean_token_accuracy"):
                self._metrics["train"].pop(name, None)
        super().log(logs, start_time)


def _kept(config) -> tuple[str, ...]:
    """What a cache can keep for a fused model, the default first: temperatures are learned from whole logits."""
    return ("hidden",) if config.gate_calibration else KEPT[config.fusion]


class _CachedRows:
    """Collates rows of the cache as one row without padding, and leaves all others to the collator there was."""

    def __init__(self, collator, cache: GateCache, domains: list[str]):
        self.collator, self.cache = collator, cache
        self.domains = {name: i for i, name in enumerate(domains)}

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        if "row" not in rows[0]:
            return self.collator(rows)
        numbers = [row["row"] for row in rows]
        places, counts = self.cache.places(numbers), np.diff(self.cache.starts)[numbers]
        domain = torch.tensor([self.domains[row["domain"]] for row in rows]).repeat_interleave(torch.tensor(counts))
        # labels are one behind: the last place stands for a token that predicts nothing
        return {
            "cached": F.pad(places, (0, 1))[None],
            "labels": F.pad(self.cache.arrays["targets"][places], (1, 0), value=-100)[None],
            "domain": F.pad(domain, (1, 0))[None],
            "attention_mask": torch.ones(1, len(places) + 1, dtype=torch.int64),
        }


def _top_of(states: list[Tensor], heads: list[Tensor], targets: Tensor) -> dict[str, Tensor]:
    """Likeliest tokens, polynomial, and labels' log-probabilities of each specialist, some tokens at a time."""
    size = CHUNK.get(targets.device.type, CHUNK_ELSEWHERE)
    found = []
    for part in torch.arange(len(targets), device=targets.device).split(size):
        words = [F.linear(h[part], w.to(h.dtype)).float().log_softmax(-1) for h, w in zip(states, heads, strict=True)]
        words = torch.stack(words, 1)
        own = words.gather(-1, targets[part, None, None].expand(-1, len(heads), 1))[..., 0]
        found.append((own, *summarised(words)))
    return dict(zip(ADDED, map(torch.cat, zip(*found, strict=True)), strict=True))


def _samples(fused: PreTrainedModel) -> Iterable[Tensor]:
    """Some values of every tensor of the specialists and their heads: enough to tell them from others."""
    for _, tensor in sorted([*fused.model.specialists.state_dict().items(), ("head", fused.lm_head.weight)]):
        flat = tensor.detach().flatten()
        yield flat[:: max(len(flat) // SAMPLES, 1)]


def _digest(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _readable(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
