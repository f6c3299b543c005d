"""What both training scripts read beside TRL's own arguments: specialists to fuse, and one dataset per domain."""

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from modeling_ultrafuser import UltraFuserForCausalLM, common_tokenizer


@dataclass
class FusedArguments:
    """Given in the YAML recipe."""

    domains: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Domain to the arguments of `load_dataset`: {math: {path: ..., split: train}}."},
    )
    specialists: dict[str, str] | None = field(
        default=None, metadata={"help": "Name to Hub id or folder, to fuse first. Or give --model_name_or_path."}
    )
    specialist_revisions: dict[str, str] | None = field(
        default=None, metadata={"help": "Name to commit of its repository, for results that can be repeated."}
    )
    chat_template: str | None = field(default=None, metadata={"help": "Whose chat template to take, if they differ."})
    gate: str = field(default="mlp", metadata={"help": "Kind of gate, when fusing: mlp, linear, constant."})
    fusion: str = field(default="logits", metadata={"help": "What is mixed, when fusing: logits or probabilities."})


def load_model(
    fused: FusedArguments, model: ModelConfig, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The fused folder named by --model_name_or_path, or else the specialists, fused now."""
    shared = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
    if bool(fused.specialists) == bool(model.model_name_or_path):
        raise ValueError(
            "Give either a fused model (--model_name_or_path) or specialists to fuse (`specialists:` in the recipe), "
            f"but got {model.model_name_or_path!r} and {fused.specialists!r}."
        )
    if fused.specialists:
        revisions = fused.specialist_revisions
        return (
            UltraFuserForCausalLM.from_specialists(
                fused.specialists, gate=fused.gate, fusion=fused.fusion, revisions=revisions, **shared
            ),
            common_tokenizer(fused.specialists, chat_template=fused.chat_template, revisions=revisions),
        )
    shared |= {"revision": model.model_revision, "trust_remote_code": trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(
        model.model_name_or_path, revision=model.model_revision, trust_remote_code=trust_remote_code
    )
    return AutoModelForCausalLM.from_pretrained(model.model_name_or_path, **shared), tokenizer


def load_domains(fused: FusedArguments) -> dict[str, Dataset]:
    """One dataset per domain, with the columns that a trainer reads."""
    if not fused.domains:
        raise ValueError("Training draws from domains, but the recipe has none. Add `domains:`, a dataset for each.")
    formats = (("messages",), ("prompt", "completion"), ("text",))  # data sets may hold several
    found = {}
    for name, arguments in fused.domains.items():
        dataset = load_dataset(**{"split": "train", **arguments})
        columns = next((f for f in formats if set(f) <= set(dataset.column_names)), None)
        if columns is None:
            raise ValueError(
                f"Rows have `messages`, `prompt` and `completion`, or `text`, but those of {name!r} have "
                f"{dataset.column_names}. Rename its columns."
            )
        found[name] = dataset.select_columns(list(columns))
    return found
