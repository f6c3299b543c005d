"""Tiny fused models with vocabularies that llama.cpp knows, and ordinary folders that commands make of them."""

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, set_seed
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import CHAT_TEMPLATE
from tests.support.tiny import specialist, tokenizer
from tests.support.tuned import changed
from ultrafuser.cli.app import app
from ultrafuser.pretrained import save_tokenizer


NAMES = ("text", "code")
FEW = ["--max-steps", "1", "--per-device-train-batch-size", "2", "--max-completion-length", "4", "--use-cpu", "true"]
# which vocabulary of llama.cpp's, and which family
FUSED = {
    "llama": ("gpt-2", "llama", {"tied": True}),
    "adapters": ("starcoder", "llama", {}),
    "qwen2": ("qwen2", "qwen2", {"tied": True}),
    "qwen3": ("qwen2", "qwen3", {"layers": 3, "hidden_size": 48}),
}
# what becomes of which, by which command
MADE = {
    "Llama: a specialist": ("llama", ["specialist", "FUSED", "code"]),
    "Llama: a merge": ("llama", ["merge", "FUSED"]),
    "Llama: a student": ("llama", ["distil", "--model", "FUSED", "--student", "code", *FEW]),
    "Llama: exported as Mixtral": ("llama", ["export", "FUSED", "--to", "mixtral"]),
    "Llama, adapters of one base: a specialist": ("adapters", ["specialist", "FUSED", "code"]),
    "Qwen 2: a specialist": ("qwen2", ["specialist", "FUSED", "code"]),
    "Qwen 3: a specialist": ("qwen3", ["specialist", "FUSED", "code"]),
}
WITH_DATA = ("distil", "export")


def known_tokenizer(vocabularies: Path, name: str) -> PreTrainedTokenizerBase:
    """One of the vocabularies that llama.cpp tests itself with, with two more special tokens and a chat template."""
    read = AutoTokenizer.from_pretrained(vocabularies, gguf_file=f"ggml-vocab-{name}.gguf")
    if name == "gpt-2":
        # a class of its own has an old name
        read = PreTrainedTokenizerFast(tokenizer_object=read.backend_tokenizer, eos_token="<|endoftext|>")
    read.pad_token = read.pad_token or read.eos_token
    ends = [token for token in ("<|im_start|>", "<|im_end|>", "<fim_prefix>") if token in read.get_vocab()]
    read.add_special_tokens({"extra_special_tokens": ends})
    read.chat_template = CHAT_TEMPLATE
    return read


def tiny_fused(folder: Path, vocabularies: Path, name: str) -> Path:
    """Writes a fused model of two specialists of one start, or of two adapters."""
    vocabulary, family, fields = FUSED[name]
    words = known_tokenizer(vocabularies, vocabulary)
    ids = {key: getattr(words, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fields = {"vocab_size": len(words), **fields, **ids}
    set_seed(0)
    if name == "adapters":
        parts = adapters(folder.with_name("parts"), specialist(family, **fields))
    else:
        parts = {}
        for seed, part in enumerate(NAMES):
            set_seed(0)
            parts[part] = changed(specialist(family, **fields), seed)
    UltraFuserForCausalLM.from_specialists(parts).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def adapters(folder: Path, base) -> dict[str, str]:
    """Writes a base and adapters of it that change what it says."""
    base.save_pretrained(folder / "base")
    for part in NAMES:
        chosen = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        chosen.base_model_name_or_path = str(folder / "base")
        get_peft_model(type(base).from_pretrained(folder / "base"), chosen).save_pretrained(folder / part)
    return {part: str(folder / part) for part in NAMES}


def ordinary(out: Path, fused: Path, words: list[str]) -> Path:
    """Runs a command that makes an ordinary folder of a fused one.

    Raises:
        RuntimeError: If it fails.
    """
    words = [word.replace("FUSED", str(fused)) for word in words]
    if words[0] in WITH_DATA:
        for part in NAMES:
            file = out.with_suffix(f".{part}.jsonl")
            file.write_text(
                "".join(json.dumps({"text": f"{part}: {i} + {i} = {2 * i}. " * 6}) + "\n" for i in range(8))
            )
            words += ["--data", f"{part}={file}"]
    done = CliRunner().invoke(app, [*words, "--out", str(out)])
    if done.exit_code != 0:
        raise RuntimeError(f"{words}: {done.output[-2000:]}") from done.exception
    return out


def with_own_vocabulary(folder: Path) -> Path:
    """Writes a model whose vocabulary llama.cpp does not know."""
    set_seed(0)
    specialist().save_pretrained(folder)
    save_tokenizer(folder, tokenizer())
    return folder


def with_new_names(folder: Path, out: Path) -> Path:
    """Writes a folder's tokenizer once more, as transformers 5 does."""
    shutil.copytree(folder, out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return out


def as_bfloat16(model: torch.nn.Module) -> torch.nn.Module:
    """A model whose weights are rounded to bfloat16 and computed with in float32, as llama.cpp does."""
    return model.bfloat16().float()
