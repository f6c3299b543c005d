"""Models to compress: what is checked of them without their numbers, and tensors one at a time."""

import os
import re
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from modeling_ultrafuser.architecture_ultrafuser import backbone_class, check_architecture
from modeling_ultrafuser.checkpoint_ultrafuser import check_weights
from modeling_ultrafuser.gguf_ultrafuser import is_gguf
from modeling_ultrafuser.lora_ultrafuser import Layers, adaptable
from modeling_ultrafuser.plan_base_ultrafuser import Files
from modeling_ultrafuser.refusals_ultrafuser import Refusal
from modeling_ultrafuser.safetensors_ultrafuser import FLOATS, Header, read_header, weight_files
from modeling_ultrafuser.specialist_config_ultrafuser import own_config

from ..provenance import weights_digest


# what a fine-tune may say otherwise than its base, and which changes nothing that it computes: Qwen2's `max_window_layers`
# shows in `layer_types`, which is compared
_FREE = re.compile(
    r"architectures|.*dtype|transformers_version|_.*|.*_token_id|.*dropout|.*_pdrop|.*_range|use_cache|"
    r"tie_word_embeddings|max_position_embeddings|pretraining_tp|auto_map|unsloth.*|id2label|label2id|task_.*|"
    r"max_window_layers|use_mrope|transformers\.js_config"
)


# of weights that have another start it is 0, but for chance
LEAST_COSINE = 0.1


class Checkpoint:
    """A causal language model's safetensors.

    Attributes:
        name: Of the specialist.
        source: Hub id or folder.
        config: Its own.
        model: Without any numbers.
        layers: Its linear layers, embedding and head, by name, as far as adapters can be on them.
        embedding: Name of its token embedding.
        head: Name of its head.
        is_tied: Whether both are one tensor.
    """

    def __init__(self, name: str, source: str, revision: str | None = None):
        """Reads configuration and headers.

        Raises:
            ValueError: If it is quantised, no causal decoder, or its files do not hold what its configuration asks for.
            OSError: If it cannot be read.
        """
        if is_gguf(source):
            raise Refusal(
                f"{name!r} is a GGUF file, {source!r}",
                "A change is what was added to plain weights, and a GGUF file's are rounded",
                "Pass the folder that it was made from.",
            )
        self.name, self.source, self.hub = name, source, {"revision": revision or "main"}
        self.config = own_config(name, source, **self.hub)
        text = self.config.get_text_config(decoder=True)
        check_architecture(name, self.config, text)
        self.header = Files().header(name, source, self.hub)
        self.model = check_weights(name, self.config, self.header)
        self.layers: Layers = adaptable(self.model, backbone_class(text))
        names = {module: n for n, module in self.model.named_modules()}
        self.embedding, self.head = names[self.model.get_input_embeddings()], names[self.model.get_output_embeddings()]
        self._saved_as = _renamed(self.model, self.header)
        self.is_tied = text.tie_word_embeddings and self.file_key(self.head) not in self.header
        self._check_names()

    def _check_names(self) -> None:
        odd = next((key for key, (dtype, _) in self.header.items() if dtype not in FLOATS), None)
        missing = next((key for key in map(self.key, self.layers) if key not in self.header), odd)
        if missing is not None:
            raise Refusal(
                f"the files of {self.name!r} hold no floating point tensor `{missing}`",
                "A change of a layer is read by the layer's name",
                "Save it once more, `AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER)`.",
                about="weights",
            )

    def key(self, layer: str) -> str:
        """Returns the name of the tensor that is a layer's weight: of a tied head, the embedding's."""
        return self.file_key(self.embedding if self.is_tied and layer == self.head else layer)

    def file_key(self, layer: str) -> str:
        """Returns the name that the weight of a layer has in files, be it there or not."""
        return self._saved_as.get(f"{layer}.weight", f"{layer}.weight")

    @property
    def others(self) -> list[str]:
        """Tensors that no adapter can be on: norms, biases, and layers that are neither linear nor plain embeddings."""
        return [key for key in self.header if key not in map(self.file_key, self.layers)]

    @property
    def fingerprint(self) -> str | None:
        """Tells its files from those of a later training."""
        return weights_digest(Path(next(iter(self._files.values()))).parent)

    @cached_property
    def _files(self) -> dict[str, str]:
        return {key: file for file in weight_files(self.source, **self.hub) for key in read_header(file)}

    def tensor(self, key: str) -> Tensor:
        """Reads a tensor, in the type that it is saved in."""
        with safe_open(self._files[key], "pt") as file:
            return file.get_tensor(key)

    def read(self, key: str) -> Tensor:
        """Reads a tensor; for the head of one that is tied, the embedding."""
        return self.tensor(key if key in self.header else self.key(self.head))

    def weight(self, layer: str) -> Tensor:
        """Reads a layer's weight in float32. Shape (out, in); of an embedding (hidden, vocab)."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        wide = self.tensor(self.key(layer)).to(device, torch.float32)
        # GPT-2's layers are kept the other way round, and an embedding reads one of its rows
        return wide if isinstance(self.model.get_submodule(layer), nn.Linear) else wide.T


def _renamed(model: nn.Module, header: Header) -> dict[str, str]:
    """Maps tensors that files have under another name, of which there is one of the shape (GPT-NeoX's head)."""
    state = {key: tuple(tensor.shape) for key, tensor in model.named_parameters()}
    left = [key for key in header if key not in state]
    found = {key: [name for name in left if header[name][1] == state[key]] for key in state.keys() - header.keys()}
    return {key: names[0] for key, names in found.items() if len(names) == 1}


RULE = "A change is a model's weights minus its base's, so both have one architecture and one shape"
WAY_OUT = "Pass the base that it was tuned from with --base, or leave it out."


def check_same(base: Checkpoint, other: Checkpoint, rule: str = RULE, way_out: str = WAY_OUT) -> None:
    """Refuses a model that cannot have been tuned from a base, as far as that shows without numbers.

    Args:
        base: The base, or the model to compare with.
        other: The model to check.
        rule: Of the refusal.
        way_out: Of the refusal.

    Raises:
        ValueError: Naming the tensor or the field of the configuration that differs.
    """
    where = "the base" if base.name == "base" else repr(base.name)
    # of one that is tied the head is not there
    keys = sorted({*base.header, *other.header} - {base.file_key(base.head)})
    shapes = {key: [c.header.get(key, (None, None))[1] for c in (base, other)] for key in keys}
    odd = next((key for key, (ours, theirs) in shapes.items() if ours != theirs), None)
    if odd is not None:
        raise Refusal(f"`{odd}` is {shapes[odd][0]} in {where} and {shapes[odd][1]} in {other.name!r}", rule, way_out)
    ours, theirs = (c.config.to_dict() for c in (base, other))
    fields = sorted(key for key in ours.keys() | theirs.keys() if not _FREE.fullmatch(key))
    odd = next((field for field in fields if ours.get(field) != theirs.get(field)), None)
    if odd is not None:
        said = f"`{odd}` is {str(ours.get(odd))[:100]} in {where} and {str(theirs.get(odd))[:100]} in {other.name!r}"
        raise Refusal(said, rule, way_out)


def cosine_of_a_layer(one: Checkpoint, other: Checkpoint) -> tuple[str, float]:
    """Returns a layer, and the cosine between its weights in two models: near 1 if both have one start."""
    layer = next(n for n in one.layers if n not in (one.embedding, one.head))
    return layer, torch.cosine_similarity(one.weight(layer).flatten(), other.weight(layer).flatten(), dim=0).item()


def check_tuned(base: Checkpoint, other: Checkpoint) -> None:
    """Refuses a model that has another start than the base, whose weights then have nothing to do with the base's.

    Raises:
        ValueError: Naming both.
    """
    layer, cosine = cosine_of_a_layer(base, other)
    if not cosine > LEAST_COSINE:
        raise Refusal(
            f"`{layer}` of {other.name!r} has nothing to do with that of the base, {os.fspath(base.source)!r}: a cosine of "
            f"{cosine:.3f}",
            "What is tuned from a base resembles it",
            "Pass the base that it was tuned from with --base, or leave it out.",
        )
