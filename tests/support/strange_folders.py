"""Folders to damage, ways to damage them, and what a command says of them."""

import json
import shutil
from pathlib import Path

from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, set_seed
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.fuzz_inputs import ROWS, merging_tokenizer
from tests.support.tiny import specialist
from ultrafuser.cli.app import app


def said(code, *words):
    """What a command says that ends like this: 0, done; 2, refused in a sentence or two, and no traceback."""
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return " ".join(result.output.replace("│", "").split())


def copied(zoo, name, tmp_path):
    return Path(shutil.copytree(zoo / name, tmp_path / "given" / name))


def tensors(change):
    """A change of the tensors in a folder's one file."""

    def apply(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return apply


def edited(file, change):
    """A change of a JSON file."""

    def apply(folder):
        found = json.loads((folder / file).read_text())
        change(found)
        (folder / file).write_text(json.dumps(found))

    return apply


def config(**fields):
    return edited("config.json", lambda c: c.update(fields))


def make_zoo(folder):
    """Two specialists over one tokenizer with merges, their fused model in one file and in several, and adapters."""
    set_seed(0)
    words = merging_tokenizer()
    for name in ("text", "code"):
        specialist(layers=2, hidden_size=16, vocab_size=ROWS).save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    assert said(0, "fuse", f"text={folder}/text", f"code={folder}/code", "--out", folder / "fused")
    UltraFuserForCausalLM.from_pretrained(folder / "fused").save_pretrained(folder / "shards", max_shard_size="20KB")
    words.save_pretrained(folder / "shards")
    for name in ("one", "two"):
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "text"), config).save_pretrained(folder / name)
    return folder
