"""A fused model in mlx-lm, for Apple silicon.

    python mlx_ultrafuser.py fused fused-mlx
    mlx_lm.generate --model ./fused-mlx --trust-remote-code --prompt "What is 47 * 36?"

The first line, in the environment of mlx-lm, writes a folder with the weights, the tokenizer, this file, and a config.json
that names this file, where mlx-lm looks for it, and no code that needs torch. It reads fusion="logits", gates that do not
look back, and specialists of `FAMILIES` with full attention. Others are rejected by name.
"""

import importlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx import nn
from mlx_lm.models.base import BaseModelArgs
from mlx_lm.models.cache import KVCache


# transformers' name of a family to mlx-lm's module
FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
LARGEST_LOG_SCALE = 2.0


@dataclass
class ModelArgs(BaseModelArgs):
    """Fields of the fused config.json that are read."""

    model_type: str
    specialist_names: list
    specialists: list
    hidden_size: int
    vocab_size: int
    layer_types: list
    gate: str
    gate_hidden_size: int
    fusion: str = "logits"
    gate_temperature: float = 1.0
    gate_calibration: bool = False
    gate_sparsifier: str = "none"
    adapters: dict | None = None
    final_logit_softcapping: float | None = None

    def __post_init__(self):
        families = {c["model_type"] for c in self.specialists}
        for what, found, able in (
            ("fusion", self.fusion, ["logits"]),
            ("gate", self.gate, list(GATES)),
            ("gate_sparsifier", self.gate_sparsifier, ["none"]),
            ("adapters", self.adapters, [None]),
            ("final_logit_softcapping", self.final_logit_softcapping, [None]),
            *(("specialists' model_type", family, list(FAMILIES)) for family in families),
            *(("layer type", kind, ["full_attention"]) for kind in set(self.layer_types)),
        ):
            if found not in able:
                raise ValueError(
                    f"This file reads fused models whose {what} is one of {able}, but it is {found!r}. Use transformers, or "
                    f"distil the model into an ordinary one: `ultrafuser distil`."
                )


def backbone(config: dict) -> nn.Module:
    """Builds a specialist's backbone, which returns its last hidden states, normed, of mlx-lm's own class."""
    family = importlib.import_module(f"mlx_lm.models.{FAMILIES[config['model_type']]}")
    rope = config.get("rope_parameters") or {}
    fields = {**config, "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0))}
    if rope.get("rope_type", "default") != "default":
        fields["rope_scaling"] = rope
    return family.Model(family.ModelArgs.from_dict({**fields, "tie_word_embeddings": False})).model


class Gate(nn.Module):
    """Weighs the specialists at every token, in float32.

    Args:
        args: Of the fused model.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        count, widths = len(args.specialists), [c["hidden_size"] for c in args.specialists]
        outputs = count + args.gate_calibration
        for name, shape in GATES[args.gate](args, outputs, widths).items():
            setattr(
                self, name, {k: mx.zeros(s) for k, s in shape.items()} if isinstance(shape, dict) else mx.zeros(shape)
            )

    def scores(self, states: list[mx.array]) -> mx.array:
        """Scores each specialist, then gives the logarithm of the scale, if there is one. (batch, seq, outputs)"""
        side_by_side = mx.concatenate(states, -1)
        if self.args.gate == "linear":
            return side_by_side @ self.weight.T + self.bias
        if self.args.gate == "cross":
            hidden = nn.relu(side_by_side @ self.hidden_weight.T + self.hidden_bias)
            return hidden @ self.score_weight.T + self.score_bias + side_by_side @ self.skip_weight.T
        if self.args.gate == "mlp":
            weights = [self.hidden_weight.get(n, self.hidden_weight.get("shared")) for n in self.args.specialist_names]
            hidden = [nn.relu(h @ w.T + self.hidden_bias) for h, w in zip(states, weights, strict=True)]
            return mx.concatenate([h @ self.score_weight.T for h in hidden], -1)
        return mx.zeros((*side_by_side.shape[:-1], len(states)))

    def __call__(self, states: list[mx.array]) -> mx.array:
        """Returns the factor of each specialist's hidden states. (batch, seq, specialists)"""
        count = len(states)
        scores = self.scores([h.astype(mx.float32) for h in states])
        factors = mx.softmax(scores[..., :count] / self.args.gate_temperature, axis=-1)
        if not self.args.gate_calibration:
            return factors
        return factors * mx.exp(mx.clip(scores[..., count:], -LARGEST_LOG_SCALE, LARGEST_LOG_SCALE))


def _mlp(args: ModelArgs, outputs: int, widths: list[int]) -> dict:
    names = ["shared"] if len(set(widths)) == 1 else args.specialist_names
    first = {n: (args.gate_hidden_size, d) for n, d in zip(names, widths, strict=False)}
    return {
        "hidden_weight": first,
        "hidden_bias": (args.gate_hidden_size,),
        "score_weight": (1, args.gate_hidden_size),
    }


def _cross(args: ModelArgs, outputs: int, widths: list[int]) -> dict:
    inner, size = args.gate_hidden_size, sum(widths)
    first = {"hidden_weight": (inner, size), "hidden_bias": (inner,)}
    return {**first, "score_weight": (outputs, inner), "skip_weight": (outputs, size), "score_bias": (outputs,)}


# shapes of each gate's parameters
GATES = {
    "uniform": lambda args, outputs, widths: {},
    "linear": lambda args, outputs, widths: {"weight": (outputs, sum(widths)), "bias": (outputs,)},
    "cross": _cross,
    "mlp": _mlp,
}


class Backbone(nn.Module):
    """Runs the specialists, and puts their hidden states side by side, times the gate's factors.

    Args:
        args: Of the fused model.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.specialists = {n: backbone(c) for n, c in zip(args.specialist_names, args.specialists, strict=True)}
        self.fusion_gate = Gate(args)

    def __call__(self, inputs: mx.array, cache: list | None = None) -> mx.array:
        states, start = [], 0
        for specialist in self.specialists.values():
            end = start + len(specialist.layers)
            states.append(specialist(inputs, None if cache is None else cache[start:end]))
            start = end
        factors = self.fusion_gate(states)
        return mx.concatenate([factors[..., k, None].astype(h.dtype) * h for k, h in enumerate(states)], -1)


class Model(nn.Module):
    """A fused model.

    Args:
        args: Fields of config.json.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args, self.model_type = args, args.model_type
        self.model = Backbone(args)
        self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: list | None = None) -> mx.array:
        return self.lm_head(self.model(inputs, cache))

    @property
    def layers(self) -> list:
        """All layers, specialist after specialist."""
        return [layer for specialist in self.model.specialists.values() for layer in specialist.layers]

    def make_cache(self) -> list[KVCache]:
        """Makes a cache with keys and values of every layer."""
        return [KVCache() for _ in self.layers]


def convert(folder: Path, out: Path) -> None:
    """Writes a fused folder's weights and tokenizer into a folder for mlx-lm, which must not be there yet."""
    config = json.loads((folder / "config.json").read_text())
    ModelArgs.from_dict(config)
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.py", "config.json", ".*"))
    shutil.copy(__file__, out / "mlx_ultrafuser.py")
    # transformers would run it to load the tokenizer
    config.pop("auto_map", None)
    config["model_file"] = "mlx_ultrafuser.py"
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    convert(*map(Path, sys.argv[1:]))
