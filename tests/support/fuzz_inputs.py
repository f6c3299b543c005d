"""Folders of every kind that is read, whole, to be damaged."""

import json
import re
import shutil
import traceback
from pathlib import Path

import yaml
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)
from typer.testing import CliRunner

import tests.conftest  # noqa: F401
from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.tiny import specialist
from ultrafuser.cli.app import app


FAMILIES = ("llama", "qwen2", "gpt_neox", "mixtral")


# a few more than tokens: some families' tokenizers bring some of their own
ROWS = 304


SAMPLES = (
    "the quick brown fox jumps over the lazy dog; 12 + 30 = 42",
    "def f(x):\n    return x + 1  # The Café’s “answer” 日本語 🙂",
    "  THE   dog\t\tjumps, </s><s> brownfox lazydog!\n\n",
)


def build(folder: Path) -> None:
    """Writes everything that will be damaged, undamaged."""
    set_seed(0)
    words = merging_tokenizer()
    for family in FAMILIES:
        for name in ("text", "code"):
            more = {"num_local_experts": 2} if family == "mixtral" else {}
            specialist(family, layers=2, hidden_size=16, vocab_size=ROWS, **more).save_pretrained(
                folder / family / name
            )
            words.save_pretrained(folder / family / name)
        both = {name: folder / family / name for name in ("text", "code")}
        fused = UltraFuserForCausalLM.from_specialists(both)
        fused.save_pretrained(folder / family / "fused")
        words.save_pretrained(folder / family / "fused")
        fused.save_pretrained(folder / family / "sharded", max_shard_size="20KB")
        words.save_pretrained(folder / family / "sharded")
    for k, name in enumerate(("one", "two")):
        model = AutoModelForCausalLM.from_pretrained(folder / "llama" / "text")
        targets = ["q_proj", "down_proj"] if k else ["q_proj", "v_proj"]
        config = LoraConfig(
            r=2 + k, lora_alpha=3, target_modules=targets, alpha_pattern={"q_proj": 5}, init_lora_weights=False
        )
        get_peft_model(model, config).save_pretrained(folder / "adapters" / name)
    assert quietly(["fuse", f"text={folder}/llama/text", f"code={folder}/llama/code", "--out", f"{folder}/whole"])
    assert quietly(["refer", f"{folder}/whole", "--out", f"{folder}/refs"])
    shutil.copytree(Path(__file__).parents[2] / "examples" / "recipes", folder / "recipes")
    (folder / "recipes" / "fuse.yaml").write_text(
        yaml.safe_dump(
            {
                "specialists": {n: str(folder / "llama" / n) for n in ("text", "code")},
                "chat_template": "text",
                "gate": "mlp",
                "fusion": "logits",
                "dtype": "float32",
                "out": str(folder / "made"),
            }
        )
    )
    rows = [{"text": text} for text in SAMPLES]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipes" / "train.yaml").write_text(
        yaml.safe_dump(
            {
                "stage": "gate",
                "model_name_or_path": str(folder / "llama" / "fused"),
                "domains": {n: {"path": "json", "data_files": str(folder / "rows.jsonl")} for n in ("text", "code")},
                "examples_per_domain": 1,
                "per_device_train_batch_size": 2,
                "max_length": 32,
                "learning_rate": 0.001,
                "report_to": "none",
            }
        )
    )


def merging_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SAMPLES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


class Inside(Exception):
    """Something else than words."""


def quietly(arguments: list[str]) -> bool:
    """Whether a command does it. Refusals in words are an answer; anything else is not."""
    result = CliRunner().invoke(app, arguments)
    if result.exit_code == 0:
        return True
    if isinstance(result.exception, SystemExit) and result.exit_code == 2:
        if re.search("not enough memory|bad alloc|MemoryError", result.output):
            raise MemoryError
        return False
    raise Inside("".join(traceback.format_exception(result.exception))[-3000:]) from result.exception
