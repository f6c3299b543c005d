"""Compresses full models into LoRA specialists of one base: what `ultrafuser compress` does."""

from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import save_file
from torch import Tensor

from modeling_ultrafuser import common_tokenizer
from modeling_ultrafuser.files_ultrafuser import read_json
from modeling_ultrafuser.generation_config_ultrafuser import own_generation_config
from modeling_ultrafuser.lora_ultrafuser import WEIGHTS_FILE
from modeling_ultrafuser.refusals_ultrafuser import Refusal
from modeling_ultrafuser.tokenizer_ultrafuser import load_tokenizer
from trainers.progress import Progress

from ..atomic import new_folder, sole_writer, write_json
from ..check import metadata
from ..provenance import digest
from .factors import Factors, Limits, factors
from .full_models import Checkpoint, check_same, check_tuned


BASE, RECORD = "base", "compressed.json"
SHARED = ("base", "mean")
ROUNDING = 1e-5


class Compression:
    """Full models, their base, and the folder of LoRA specialists that is made of them.

    The base keeps its linear layers, embedding and head, or takes the specialists' mean. Of all other tensors, which no
    LoRA adapter holds, it takes the mean. Each specialist is an adapter of it: of the change of each layer, the largest
    singular values, as in Twin-Merging (Lu et al., 2024, arXiv 2406.15479).

    Attributes:
        specialists: By name.
        base: The model that all were tuned from.
        limits: Of rank and error.
        shared: "base" or "mean": what the base of the adapters is in the layers that they are on.
    """

    def __init__(self, specialists: list[str], base: str, limits: Limits, shared: str = "base"):
        """Reads and checks everything but numbers.

        Args:
            specialists: Each NAME=ID, NAME=ID@COMMIT or NAME=FOLDER.
            base: The same without a name.
            limits: Of rank and error.
            shared: One of `SHARED`.

        Raises:
            ValueError: If a limit cannot be, or a model is not of the base's architecture and shape.
            OSError: If one cannot be read.
        """
        limits.check()
        if shared not in SHARED:
            raise Refusal(
                f"`shared` is {shared!r}", "Adapters share their base or the mean", f"Choose one of {SHARED}."
            )
        places = metadata.parse(specialists)
        if BASE in places:
            raise Refusal(
                f"a specialist is called {BASE!r}",
                "The base's folder is called so",
                "Choose another name.",
                about="name",
            )
        [place] = metadata.parse([base]).values()
        self.base, self.limits, self.shared = Checkpoint(BASE, *place), limits, shared
        self.specialists = {name: Checkpoint(name, *place) for name, place in places.items()}
        for specialist in self.specialists.values():
            check_same(self.base, specialist)
        self.tokenizer = one_tokenizer([*self.specialists.values(), self.base])

    @property
    def identity(self) -> str:
        """A fingerprint of what is compressed, and how."""
        checkpoints = [self.base, *self.specialists.values()]
        return digest([[(c.name, c.fingerprint) for c in checkpoints], list(self.limits), self.shared])

    def run(self, out: Path, say: Callable[[str], None] = print) -> dict[str, dict]:
        """Writes the base and the specialists. A run that was killed goes on with the first that is not there.

        Args:
            out: Folder to write.
            say: Called with what is worth knowing.

        Returns:
            By specialist: `numbers` kept, `of` all, `layers`, name to rank and relative error, and `error` of all layers.

        Raises:
            ValueError: If a model was not tuned from the base, or holds numbers that are not finite.
            FileExistsError: If something else is in `out`.
        """
        for specialist in self.specialists.values():
            check_tuned(self.base, specialist)
        with sole_writer(out, "compress", [BASE, *self.specialists, RECORD]):
            record = self._record(out)
            if not (out / BASE).exists():
                self._write_base(out / BASE)
            base = Checkpoint(BASE, str(out / BASE))
            self._say_kept(base, say)
            for name, specialist in self.specialists.items():
                if not (out / name).exists():
                    record["specialists"][name] = self._write(out, base, specialist)
                    write_json(out / RECORD, record)
                if not record["specialists"][name]["layers"]:
                    say(
                        f"{name}: no layer differs from the base, so its adapter is empty. Fuse {out / BASE} in its place."
                    )
        return record["specialists"]

    def above(self, reports: dict[str, dict]) -> int:
        """Counts the layers that the highest rank keeps from meeting the error."""
        errors = (about["error"] for report in reports.values() for about in report["layers"].values())
        return sum(error > self.limits.error + ROUNDING for error in errors)

    def _record(self, out: Path) -> dict:
        record = {"identity": self.identity, "specialists": {}}
        if (out / RECORD).exists():
            found = read_json(out / RECORD)
            if found.get("identity") != record["identity"]:
                raise FileExistsError(
                    f"{str(out)!r} holds models that were compressed from others or otherwise, and is gone on with as it was "
                    f"begun alone. Choose another folder."
                )
            return found
        write_json(out / RECORD, record)
        return record

    # ---- the base

    def _write_base(self, folder: Path) -> None:
        base, others = self.base, set(self.base.others)
        state = {}
        with new_folder(folder) as part, Progress("base", len(base.header)) as progress:
            for key in base.header:
                state[key] = self._mean(key) if key in others or self.shared == "mean" else base.tensor(key)
                progress.add()
            config = base.config
            if base.is_tied and self._changes_words():
                # adapters of embedding and head would both be added to one tensor when they are merged
                config.tie_word_embeddings = config.get_text_config(decoder=True).tie_word_embeddings = False
                state[base.file_key(base.head)] = self._shared(base.key(base.head)).clone()
            save_torch_state_dict(state, part)
            config.architectures = [type(base.model).__name__]
            config.save_pretrained(part)
            if (settings := own_generation_config(base.source, base.config, **base.hub)) is not None:
                settings.save_pretrained(part)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(part)

    def _mean(self, key: str) -> Tensor:
        """Averages a tensor over specialists; the base's own, bit by bit, if none has changed it."""
        own = self.base.tensor(key)
        found = [c.tensor(key) for c in self.all]
        if all(torch.equal(t, own) for t in found):
            return own
        return torch.stack([t.float() for t in found]).mean(0).to(own.dtype)

    def _changes_words(self) -> bool:
        """Returns whether any specialist's embedding or head is not the shared one, where the base's are one tensor."""
        key = self.base.key(self.base.head)
        return any(not c.is_tied or not torch.equal(c.tensor(key), self._shared(key)) for c in self.all)

    def _shared(self, key: str) -> Tensor:
        return self._mean(key) if self.shared == "mean" else self.base.tensor(key)

    def _say_kept(self, base: Checkpoint, say: Callable[[str], None]) -> None:
        """Says which tensors no adapter holds, and how far the mean is from each specialist's."""
        changed = [
            key for key in base.others if any(not torch.equal(c.tensor(key), base.tensor(key)) for c in self.all)
        ]
        if changed:
            kinds = sorted({key.rpartition(".")[0].rpartition(".")[2] or key for key in changed})
            say(
                f"{len(changed)} tensors that LoRA does not hold ({', '.join(kinds)}) are the specialists' mean in the base. "
                f"The largest difference to a specialist's is {max(self._distance(base, key) for key in changed):.1%}."
            )

    @property
    def all(self) -> list[Checkpoint]:
        """The specialists."""
        return [*self.specialists.values()]

    def _distance(self, base: Checkpoint, key: str) -> float:
        mean = base.tensor(key).float()
        return max((c.tensor(key).float() - mean).norm().item() for c in self.all) / max(mean.norm().item(), 1e-12)

    # ---- a specialist

    def _write(self, out: Path, base: Checkpoint, specialist: Checkpoint) -> dict:
        """Writes a specialist as PEFT does."""
        state, report = {}, {}
        with new_folder(out / specialist.name) as part, Progress(specialist.name, len(base.layers)) as progress:
            for layer, found in self._changes(base, specialist):
                if found is not None:
                    key = f"base_model.model.{layer}.{base.layers[layer].key}"
                    state |= {key.format("A"): found.right, key.format("B"): found.left}
                    report[layer] = {"rank": len(found.right), "error": found.error, "size": found.size}
                progress.add()
            save_file(state, part / WEIGHTS_FILE, metadata={"format": "pt"})
            _config({n: about["rank"] for n, about in report.items()}, out / BASE).save_pretrained(part)
        total = sum(about["size"] ** 2 for about in report.values()) ** 0.5
        lost = sum((about["error"] * about["size"]) ** 2 for about in report.values()) ** 0.5
        return {
            "numbers": sum(t.numel() for t in state.values()),
            "of": sum(torch.Size(shape).numel() for _, shape in specialist.header.values()),
            "error": lost / total if total else 0.0,
            "layers": {n: {"rank": about["rank"], "error": about["error"]} for n, about in report.items()},
        }

    def _changes(self, base: Checkpoint, specialist: Checkpoint):
        """Yields each layer with the factors of its change. Of a tied embedding and head there is one decomposition."""
        kept: dict[str, Factors] = {}
        for layer in base.layers:
            key = specialist.key(layer)
            if key in kept:
                found = kept[key]
                # one is read the other way round
                yield layer, found and Factors(_turned(found.right), _turned(found.left), *found[2:])
                continue
            change = specialist.weight(layer) - base.weight(layer)
            if not change.isfinite().all():
                raise Refusal(
                    f"`{key}` of {specialist.name!r}, or of the base, holds numbers that are not finite",
                    "Weights must be finite numbers",
                    "Download it again, or leave it out.",
                )
            found = factors(change, self.limits)
            if specialist.is_tied and self.base.is_tied:
                kept[key] = found
            yield layer, found


def _turned(matrix: Tensor) -> Tensor:
    # a copy, which `contiguous` alone is not at rank 1
    return matrix.T.clone(memory_format=torch.contiguous_format)


def _config(ranks: dict[str, int], base: Path) -> LoraConfig:
    """Returns PEFT's configuration of an adapter with a factor of 1 everywhere."""
    most = max(ranks.values(), default=1)
    other = {layer: rank for layer, rank in ranks.items() if rank != most}
    return LoraConfig(
        r=most,
        lora_alpha=most,
        target_modules=sorted(ranks) or DUMMY_TARGET_MODULES,
        rank_pattern=other,
        alpha_pattern=dict(other),
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=str(base.resolve()),
    )


def one_tokenizer(checkpoints: list[Checkpoint]):
    """Returns the one tokenizer of all, with the chat template of the first that has any; None if there is none."""
    found = {c.name: load_tokenizer(c.source, None, **c.hub) for c in checkpoints}
    found = {name: tokenizer for name, tokenizer in found.items() if tokenizer is not None}
    if not found:
        return None
    first = next((name for name, t in found.items() if t.chat_template), next(iter(found)))
    return common_tokenizer(found, chat_template=first)
