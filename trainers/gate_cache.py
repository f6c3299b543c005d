"""Stage one from one pass: frozen specialists run over the data once, and any number of gates is trained on that.

Specialists that do not move say the same of a token in every epoch. What the gate reads is kept in files that are mapped
into memory: last hidden states, and the evidence of a gate that looks back. So is what the loss needs besides, of which
each fusion rule's head has several kinds: see `Head.kept` in `heads`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from modeling_ultrafuser.gate_base_ultrafuser import Reads
from modeling_ultrafuser.log_ultrafuser import print_line
from modeling_ultrafuser.readers_ultrafuser import state_widths

from .compat import forget_metrics, on_device, without_unused_columns
from .domains import DomainCollator
from .forward_hooks import capture, evaluating
from .heads.head_base import TokenScores, scattered
from .progress import Progress
from .stage_gate import GateTrainer


STATE, LOCK = "cache.json", ".lock"
SAMPLES = 1024  # values of each of the specialists' tensors that tell them from others


class GateCache:
    """Keeps the specialists' predictions at every supervised token, one file per kind, in the order of the training data.

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
            held = lock.acquire(timeout=0)
        except Timeout:
            print_line(f"Another process is making the cache in {self.folder}: what it makes is used when it is done.")
            held = lock.acquire()
        with held:
            self.rows_done = self._rows_there()
            yield

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
        """Returns the indices of the rows' tokens. Shape (tokens,)."""
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
        keep: A name in `Head.kept` of the fusion rule's head. Default: its first, which is exact.
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
        self.head = self.scorer.head
        kinds = self.head.kinds()
        self.keep = next(iter(kinds)) if keep is None else keep
        self._check(kinds)
        self.kept = kinds[self.keep](self.fused.config)
        self.kept.check()
        self.rows = without_unused_columns(self, self.train_dataset)
        dtype = dtype or next(self.fused.model.specialists.parameters()).dtype
        counts: list[int] = []
        gate = self.fused.model.fusion_gate
        identity = {
            "keep": self.keep,
            "dtype": str(dtype).removeprefix("torch."),
            "rows": _digest(self._counted(counts)),
            "specialists": _digest(_samples(self.fused)),
            # one made for a gate that reads the past serves all that do not
            **({"evidence": [list(numbers) for numbers in gate.evidence]} if Reads.PAST in gate.reads else {}),
        }
        self.cache = GateCache(cache, identity, counts, self._fields(dtype))
        # from here on an example is the place of its row
        self.train_dataset = Dataset.from_dict({"row": range(len(counts)), "domain": list(self.rows["domain"])})
        self.data_collator = _CachedRows(self.data_collator, self.cache)
        self.scorer.from_cache = self._scores

    def _check(self, kinds: dict) -> None:
        config, world = self.fused.config, self.args.world_size
        if self.keep not in kinds:
            calibrated = " and a calibrated gate" if config.gate_calibration else ""
            calibrated += " and signed weights" if config.signed_weights is not None else ""
            raise ValueError(
                f"For fusion={config.fusion!r}{calibrated} a cache keeps one of {list(kinds)}, but `keep` is "
                f"{self.keep!r}."
            )
        reward = self.controller and self.controller.reward
        if reward and (reward.reads_pool or reward.watches_specialists):
            raise ValueError(
                f"A cache holds the training data alone, but mix_reward={self.args.mix_reward!r} runs the specialists on "
                f"the way. Use mix_reward='loss', or GateTrainer."
            )
        if Reads.PROMPT in self.fused.model.fusion_gate.reads:
            raise ValueError(
                f"A cache holds what specialists say of each token, but the gate {config.gate!r} reads the prompt. Train it "
                f"with GateTrainer."
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
        gate, specialists = self.fused.model.fusion_gate, self.fused.config.specialists
        fields = {"targets": ((), torch.int64), "states": ((sum(state_widths(self.fused.config)),), dtype)}
        if Reads.PAST in gate.reads:
            fields["evidence"] = ((len(specialists), sum(map(len, gate.evidence))), torch.float32)
        return fields | self.kept.fields()

    # ---- the pass

    def train(self, *args, **kwargs):
        """As `GateTrainer.train`, after what is missing of the pass."""
        self.fill()
        return super().train(*args, **kwargs)

    def fill(self) -> None:
        """Makes what is missing of the pass."""
        if self.cache.complete:
            return
        size = self.args.per_device_train_batch_size
        with evaluating(self.fused), self.cache.alone(), self._progress() as progress:
            while not self.cache.complete:
                first = self.cache.rows_done
                rows = range(first, min(first + size, len(self.rows)))
                self.cache.write(len(rows), self._said_of(rows))
                progress.add(len(rows))

    def _progress(self) -> Progress:
        return Progress("specialists read the data", len(self.rows), done=self.cache.rows_done)

    @torch.no_grad()
    def _said_of(self, rows: Iterable[int]) -> dict[str, Tensor]:
        """Computes what is kept of some rows' supervised tokens."""
        batch = on_device(self, self.data_collator.collator([self.rows[i] for i in rows]))
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
            said |= self.kept.made(states, heads, targets)
        return said

    # ---- training on it

    def _scores(self, cached: Tensor, labels: Tensor) -> TokenScores:
        """Scores labels of tokens in the cache. `cached` holds their places. Shapes (1, tokens + 1)."""
        arrays, widths = self.cache.arrays, state_widths(self.fused.config)
        states, *evidence = (
            arrays[name][cached.cpu()].to(self.args.device) for name in ("states", "evidence") if name in arrays
        )
        # as a module, so that what watches it sees it
        weights, scales = self.fused.model.fusion_gate(states.split(widths, -1), *evidence)
        states, weights, scales = (None if t is None else t[0, :-1] for t in (states, weights, scales))
        places = cached[0, :-1].cpu()
        kept = {name: arrays[name][places].to(weights.device) for name in self.kept.fields()}
        inputs = (kept, states, weights, scales, labels[0, 1:])
        scores = self.kept.score(self.head, self.fused.lm_head.weight, *inputs)
        return scattered(labels[:, 1:] != -100, *scores)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `GateTrainer.log`, without what only all of the vocabulary could tell."""
        if not self.kept.sees_vocabulary and self.model.training:
            forget_metrics(self, ("entropy", "mean_token_accuracy"))
        super().log(logs, start_time)


class _CachedRows:
    """Collates rows of the cache as one row without padding, and leaves all others to the collator there was."""

    def __init__(self, collator: DomainCollator, cache: GateCache):
        self.collator, self.cache = collator, cache

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        if "row" not in rows[0]:
            return self.collator(rows)
        numbers = [row["row"] for row in rows]
        places, counts = self.cache.places(numbers), np.diff(self.cache.starts)[numbers]
        domain = torch.tensor([self.collator.indices[row["domain"]] for row in rows])
        domain = domain.repeat_interleave(torch.tensor(counts))
        # labels are one behind: the last place stands for a token that predicts nothing
        return {
            "cached": F.pad(places, (0, 1))[None],
            "labels": F.pad(self.cache.arrays["targets"][places], (1, 0), value=-100)[None],
            "domain": F.pad(domain, (1, 0))[None],
            "attention_mask": torch.ones(1, len(places) + 1, dtype=torch.int64),
        }


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
