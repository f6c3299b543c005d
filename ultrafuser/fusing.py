"""From a few words to the folder of a fused model: the plan, the specialists one after another, and what was taken."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import yaml
from huggingface_hub import hf_hub_download, snapshot_download
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM, common_tokenizer
from modeling_ultrafuser.checking_ultrafuser import as_dtype, auto_class, check_architecture, common_dtype, own_config

from . import licences
from .folders import new_folder, save_fused


# what `from_pretrained` reads; repositories hold other copies of the same weights beside it
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")


@dataclass
class Fusion:
    """What to fuse, as a recipe says it."""

    specialists: dict[str, str] | None = field(
        default=None, metadata={"help": "Name to Hub id or folder, to fuse first. Or give --model_name_or_path."}
    )
    specialist_revisions: dict[str, str] | None = field(
        default=None, metadata={"help": "Name to commit of its repository, for results that can be repeated."}
    )
    chat_template: str | None = field(default=None, metadata={"help": "Whose chat template to take, if they differ."})
    gate: str = field(default="mlp", metadata={"help": "Kind of gate, when fusing: mlp, linear, constant."})
    fusion: str = field(default="logits", metadata={"help": "What is mixed, when fusing: logits or probabilities."})


@dataclass
class Plan:
    """What fusing will do, known before any weights are.

    Attributes:
        sources: Hub id or folder of each specialist, by name.
        commits: Of those that come from the Hub, by name.
        config: Of the fused model.
        dtype: Of its specialists and head.
        tokenizer: With its chat template.
        sizes: Bytes of each specialist's share in the fused model, by name; of the gate, as "gate".
    """

    sources: dict[str, str]
    commits: dict[str, str]
    config: UltraFuserConfig
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase
    sizes: dict[str, int]

    @property
    def size(self) -> int:
        """Of the weights, in bytes."""
        return sum(self.sizes.values())

    def table(self) -> Table:
        """One line per specialist."""
        table = Table(box=None, header_style="", pad_edge=False)
        for column in ("specialist", "from", "architecture", "layers", "hidden", "size"):
            table.add_column(column, justify="right" if column in ("layers", "hidden", "size") else "left")
        for (name, source), c in zip(self.sources.items(), self.config.specialists, strict=True):
            commit = f"@{self.commits[name][:7]}" if name in self.commits else ""
            numbers = (c.num_hidden_layers, c.hidden_size, size_in_words(self.sizes[name]))
            table.add_row(name, f"{source}{commit}", c.model_type, *map(str, numbers))
        return table

    def words(self) -> str:
        """What the table does not say, in lines."""
        c = self.config
        return (
            f"{size_in_words(self.size)} on disk in {str(self.dtype).removeprefix('torch.')}\n"
            f"{c.vocab_size:,} tokens of vocabulary, context of {c.max_position_embeddings or 'unstated'} tokens, "
            f"gate {c.gate!r} ({size_in_words(self.sizes['gate'])}), fusion of {c.fusion}, "
            f"{'with a' if self.tokenizer.chat_template else 'no'} chat template"
        )


def load_recipe(path: Path) -> tuple[Fusion, dict[str, str]]:
    """Reads a YAML file that says what to fuse, and may say `dtype` and `out` too.

    Returns:
        What to fuse; and `dtype` and `out`, where given.

    Raises:
        ValueError: If it holds something else.
        OSError: If it cannot be read.
    """
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = [f.name for f in fields(Fusion)]
    unknown = sorted(set(raw) - {*known, "dtype", "out"}) if isinstance(raw, dict) else [type(raw).__name__]
    if unknown:
        raise ValueError(
            f"A recipe for fusing has the fields {[*known, 'dtype', 'out']}, but {str(path)!r} has {unknown}. Recipes "
            f"for training are for `ultrafuser train`, which fuses first."
        )
    return Fusion(**{k: v for k, v in raw.items() if k in known}), {k: raw[k] for k in ("dtype", "out") if k in raw}


def make_plan(recipe: Fusion, dtype: str = "auto") -> Plan:
    """Reads what there is beside the weights, and refuses what can be refused by it.

    Raises:
        ValueError: If the specialists cannot be fused, with the rule, what came, and the way out.
        OSError: If one cannot be found or read.
    """
    specialists = {n: os.fspath(s) for n, s in (recipe.specialists or {}).items()}
    revisions = recipe.specialist_revisions or {}
    if len(specialists) < 2 or set(revisions) - set(specialists):
        raise ValueError(
            f"Fusing needs at least two specialists, name=ID each, and revisions of those, but got specialists "
            f"{specialists} and revisions {revisions}."
        )
    configs = {n: own_config(n, s, revision=revisions.get(n) or "main") for n, s in specialists.items()}
    commits = {n: commit for n, s in specialists.items() if (commit := commit_of(s, revisions.get(n)))}
    text_configs = {n: c.get_text_config(decoder=True) for n, c in configs.items()}
    for name, config in configs.items():
        check_architecture(name, config, text_configs[name])
        auto_class(name, config)
    chosen = common_dtype({}, configs) if dtype == "auto" else as_dtype(dtype)
    rows = min(c.vocab_size for c in text_configs.values())
    for config in text_configs.values():
        config.vocab_size = rows
    choices = {"gate": recipe.gate, "fusion": recipe.fusion}
    config = UltraFuserConfig(
        specialist_names=list(specialists), specialists=list(text_configs.values()), vocab_size=rows, **choices
    )
    tokenizer = common_tokenizer(specialists, chat_template=recipe.chat_template, revisions=commits, vocab_size=rows)
    chosen = chosen or torch.float32
    return Plan(specialists, commits, config, chosen, tokenizer, _sizes(config, chosen))


def _sizes(config: UltraFuserConfig, dtype: torch.dtype) -> dict[str, int]:
    with torch.device("meta"):
        model = UltraFuserForCausalLM(config)
    pairs = zip(config.specialist_names, config.specialists, strict=True)
    sizes = {
        name: dtype.itemsize
        * (sum(p.numel() for p in model.model.specialists[name].parameters()) + config.vocab_size * c.hidden_size)
        for name, c in pairs
    }
    # its numbers are float32, whatever those of the rest
    return sizes | {"gate": 4 * sum(p.numel() for p in model.model.fusion_gate.parameters())}


def fuse(recipe: Fusion, out: Path, *, dtype: str = "auto", say: Callable[[str], None] = print) -> Plan:
    """Writes the folder of a fused model: weights, code, tokenizer, and where the specialists come from.

    Killed at any time, it leaves nothing that loads; run again, it goes on with the files that the Hub's cache has.

    Args:
        recipe: What to fuse.
        out: The folder to write. There must be nothing in it.
        dtype: Of the specialists and the head; "auto" takes what they share.
        say: Called with a line about each step.

    Raises:
        FileExistsError: If there is something in `out`.
        ValueError: If the specialists cannot be fused.
        OSError: If one cannot be read, or the disk is too small.
    """
    with new_folder(out) as folder:
        plan = make_plan(recipe, dtype)
        free = shutil.disk_usage(folder).free
        if free < plan.size:
            raise OSError(
                f"The fused model takes {size_in_words(plan.size)}, but {size_in_words(free)} are free at "
                f"{str(out)!r}. Make room, or choose a folder on another disk."
            )
        ingredients = {}
        for k, (name, source) in enumerate(plan.sources.items(), start=1):
            commit = plan.commits.get(name)
            say(f"{name} ({k} of {len(plan.sources)}): {source}")
            if commit:
                snapshot_download(source, revision=commit, allow_patterns=list(WEIGHTS))
            ingredients[name] = described(name, source, commit)
        say("fusing")
        model = UltraFuserForCausalLM.from_specialists(
            plan.sources, gate=recipe.gate, fusion=recipe.fusion, dtype=dtype, revisions=plan.commits
        )
        say(f"writing {size_in_words(plan.size)}")
        save_fused(folder, model, plan.tokenizer, ingredients)
    return plan


def commit_of(source: str, revision: str | None = None) -> str | None:
    """The commit that a revision of a Hub's repository is at now; None for a folder."""
    if os.path.isdir(source):
        return None
    # the folder of a snapshot is named after its commit
    return Path(hf_hub_download(source, "config.json", revision=revision)).parent.name


def described(name: str, source: str, commit: str | None) -> dict[str, str | None]:
    """Where a specialist comes from and what its card says of its licence, to be kept beside the model."""
    try:
        card = licences.read_ingredient(name, source)
    except ValueError as error:
        card = licences.Ingredient(name, problem=str(error))
    stated = {"licence": card.licence, "terms": card.terms, "link": card.link, "problem": card.problem}
    return {"source": source, "commit": commit, **{key: value for key, value in stated.items() if value}}


def size_in_words(size: float) -> str:
    """Bytes with a unit that suits them."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
