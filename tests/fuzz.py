"""Damages files at random, gives them to the commands, and counts what becomes of it.

python -m tests.fuzz --seed 0 --mutations 2000

Stopped, it goes on where it was. Every mutation ends in one of these:

- right: what was given is loaded, and holds what its files say. Fused models hold, bit for bit, the tensors of the files,
  all of them and no others; tokenizers split and join samples of text as before; adapters say what PEFT makes of them;
  references rebuild the very model that they were made from. A number in a configuration that changes what is computed
  and not what is loaded, such as the base of rotary positions, is the statement of whoever wrote the file; so are the
  numbers in a tensor.
- words: refused with an error that a command turns into a sentence and exit status 2.
- inside: an error from inside, which a command would show as a traceback.
- other: loaded, and something else than the files say.
- slow, memory, dead: more than 20 seconds of a processor or two minutes by the clock, more than 2 GB, or the process is
  gone.
"""

import argparse
import contextlib
import copy
import dataclasses
import io
import json
import os
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing import get_context
from pathlib import Path

import tests.conftest  # noqa: F401


# isort: split
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.utils import logging
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.tiny import specialist
from trainers.stage_config import StageConfig
from ultrafuser.cli.app import app


RESULT = Path(__file__).parents[1] / "results" / "fuzz.json"
KINDS = ("configurations", "weights", "tokenizers", "adapters", "references", "recipes")
OUTCOMES = ("right", "words", "inside", "other", "slow", "memory", "dead")
FAMILIES = ("llama", "qwen2", "gpt_neox", "mixtral")
# a few more than tokens: some families' tokenizers bring some of their own
ROWS = 304
SECONDS, SECONDS_BY_CLOCK, BYTES = 20, 120, 2 << 30
SAMPLES = (
    "the quick brown fox jumps over the lazy dog; 12 + 30 = 42",
    "def f(x):\n    return x + 1  # The Café’s “answer” 日本語 🙂",
    "  THE   dog\t\tjumps, </s><s> brownfox lazydog!\n\n",
)
ODD = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 1.5, -0.5, float("nan"), float("inf"), 1e-320, 1e300),
    *(10**6, 10**12, -(10**9), 2**31, 2**63, 10**400),
    *(
        "",
        "x",
        "text",
        "0",
        "float99",
        "../..",
        "/etc/hostname",
        "\x00",
        "\x1b[31m",
        "\ud800",
        "(.*.*)*=$",
        "{{ 1 }}",
        "ä" * 3000,
    ),
    *([], [None], [1, 2, 3], ["a", "b"], {}, {"a": 1}, {"": None}, [[[[]]]]),
)
# fields that a file may lack and a library knows
FIELDS = sorted(
    {
        *(field for config in (GenerationConfig, LlamaConfig, MixtralConfig) for field in config().to_dict()),
        *(field.name for config in (LoraConfig, StageConfig) for field in dataclasses.fields(config)),
    }
)


# ---------------------------------------------------------------------------------- what is damaged


def build(folder: Path) -> None:
    """Writes everything that will be damaged, undamaged."""
    set_seed(0)
    words = _tokenizer()
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
    shutil.copytree(Path(__file__).parents[1] / "examples" / "recipes", folder / "recipes")
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


def _tokenizer() -> PreTrainedTokenizerFast:
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


# ---------------------------------------------------------------------------------- how it is damaged


def paths(value, here=()):
    """Every place in a tree of dicts and lists."""
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*here, key))


def damaged_tree(dice: random.Random, tree):
    """The same with one to three values changed."""
    tree = copy.deepcopy(tree)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        places = [p for p in paths(tree) if p]
        if not places:
            return dice.choice(ODD)
        *upper, last = dice.choice(places)
        owner = tree
        for key in upper:
            owner = owner[key]
        value, how = owner[last], dice.randrange(11)
        if how == 0:
            del owner[last]
        elif how == 1 and isinstance(owner, dict):
            owner[dice.choice((last + "x", last.upper(), "x", *owner))] = owner.pop(last)
        elif how == 2 and isinstance(owner, list):
            owner.insert(last, copy.deepcopy(value))
        elif how == 3 and len(owner) > 1:
            other = dice.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
            owner[last], owner[other] = owner[other], owner[last]
        elif how == 4 and isinstance(value, int | float):
            owner[last] = dice.choice((value + 1, value - 1, value * 2, -value, str(value), [value], value * 1000))
        elif how == 5:
            for _ in range(dice.choice((3, 70, 200))):
                value = [value]
            owner[last] = value
        elif how == 6:
            owner[last] = copy.deepcopy(dice.choice([v for p in places if (v := _at(tree, p)) is not tree]))
        elif how == 7 and isinstance(owner, dict):
            owner[dice.choice(FIELDS)] = copy.deepcopy(dice.choice(ODD))
        else:
            owner[last] = copy.deepcopy(dice.choice(ODD))
    return tree


def _at(tree, place):
    for key in place:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def damaged_bytes(dice: random.Random, text: bytes) -> bytes:
    """The same with something flipped, cut, doubled or put in."""
    at, length = dice.randrange(len(text) + 1), dice.choice((1, 1, 2, 8, 100, 5000))
    how = dice.randrange(7)
    if how == 0 and text:
        at = min(at, len(text) - 1)
        return text[:at] + bytes([text[at] ^ 1 << dice.randrange(8)]) + text[at + 1 :]
    if how == 1:
        return text[:at]
    if how == 2:
        return text[:at] + text[at + length :]
    if how == 3:
        return text[:at] + text[at : at + length] * 2 + text[at + length :]
    if how == 4:
        return text[:at] + dice.randbytes(length) + text[at:]
    if how == 5:
        return (
            text[:at]
            + dice.choice((b"[" * 100_000, b'{"a":' * 5000, b"null", b"NaN", b"1e999", b"\xff\xfe", b"&a *a "))
            + text[at:]
        )
    return dice.choice((b"", b"null", b"[]", b"{}", b"x", b"0", b"[" * 200_000, text + text))


def damage_json(dice: random.Random, path: Path) -> None:
    if dice.random() < 0.25:
        path.write_bytes(damaged_bytes(dice, path.read_bytes()))
    else:
        with contextlib.suppress(RecursionError):
            path.write_text(json.dumps(damaged_tree(dice, json.loads(path.read_text()))))


def damage_kind(dice: random.Random, path: Path) -> None:
    """Something else than a file in a file's place."""
    path.unlink()
    how = dice.randrange(5)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.symlink_to("/dev/zero")
    elif how == 2:
        path.mkdir()
    elif how == 3:
        path.symlink_to(path.name)


def damage_weights(dice: random.Random, path: Path) -> None:
    """Header or bytes of a safetensors file."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    how = dice.random()
    if how < 0.25:
        path.write_bytes(damaged_bytes(dice, raw))
    elif how < 0.35:
        path.write_bytes(raw[: 8 + length] + damaged_bytes(dice, raw[8 + length :]))
    elif how < 0.45:
        at = dice.randrange(8)
        path.write_bytes(raw[:at] + bytes([dice.randrange(256)]) + raw[at + 1 :])
    else:
        header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
        keys = [k for k in header if k != "__metadata__"]
        one, other = dice.choice(keys), dice.choice(keys)
        how = dice.randrange(8)
        if how == 0:
            header[dice.choice((one + "x", one.replace("0", "1"), one.replace("layers", "layer"), "x"))] = header.pop(
                one
            )
        elif how == 1:
            header[one], header[other] = header[other], header[one]
        elif how == 2:
            header[one]["dtype"] = dice.choice(
                ("I32", "U32", "F16", "BF16", "I8", "BOOL", "F64", "X", None, "C64", "F8_E4M3")
            )
        elif how == 3:
            header[one]["shape"] = dice.choice(
                (header[one]["shape"][::-1], [*header[one]["shape"], 1], [-1], [], None, [1 << 60])
            )
        elif how == 4:
            # a tensor less, whole otherwise
            start, end = header.pop(one)["data_offsets"]
            body = body[:start] + body[end:]
            for key in header.keys() - {"__metadata__"}:
                if header[key]["data_offsets"][0] >= end:
                    header[key]["data_offsets"] = [n - end + start for n in header[key]["data_offsets"]]
        elif how == 5:
            # a tensor more
            header[dice.choice(("extra.weight", one + "2", "model.layers.9.mlp.weight"))] = {
                "dtype": "F32",
                "shape": [2],
                "data_offsets": [len(body), len(body) + 8],
            }
            body += b"\0" * 8
        elif how == 6:
            # integers of the same size
            header[one]["dtype"] = {"F32": "I32", "F16": "I16", "BF16": "I16"}.get(header[one]["dtype"], "I32")
        else:
            header = damaged_tree(dice, header)
        try:
            written = json.dumps(header).encode()
        except RecursionError:
            written = b"[" * 100_000
        written += b" " * (-len(written) % 8)
        path.write_bytes(struct.pack("<Q", len(written)) + written + body)


def damage_yaml(dice: random.Random, path: Path) -> None:
    how = dice.random()
    if how < 0.4:
        path.write_bytes(damaged_bytes(dice, path.read_bytes()))
    elif how < 0.45:
        path.write_text(
            "a: &a [x,x,x]\n"
            + "".join(f"b{i}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9))
        )
    elif how < 0.55:
        tree = yaml.safe_load(path.read_text())
        path.write_text(
            yaml.safe_dump(dict(dice.sample(sorted(tree.items()), len(tree))), sort_keys=dice.random() < 0.5)
        )
    else:
        with contextlib.suppress(RecursionError):
            path.write_text(
                yaml.safe_dump(damaged_tree(dice, yaml.safe_load(path.read_text())), sort_keys=dice.random() < 0.5)
            )


# ---------------------------------------------------------------------------------- what becomes of it


class Inside(Exception):
    """Something else than words."""


class Other(Exception):
    """Another model than the files say."""


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


def in_python(call, *arguments, **options):
    """What a call returns, or None if it is refused in words."""
    try:
        return call(*arguments, **options)
    except (ValueError, OSError) as error:
        if re.search("not enough memory|bad alloc|MemoryError", str(error)):
            raise MemoryError from error
        return None
    except MemoryError:
        raise
    except Exception as error:
        raise Inside("".join(traceback.format_exception(error))[-3000:]) from error


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """What is in a folder's files, read without the code under test."""
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    )


def expect_files(model, folder: Path, scratch: Path) -> None:
    """Refuses a model that does not hold what its folder holds; saving it writes the names that the files have."""
    with tempfile.TemporaryDirectory(dir=scratch) as again:
        model.save_pretrained(again)
        ours, theirs = tensors_of(Path(again)), tensors_of(folder)
    if ours.keys() != theirs.keys():
        raise Other(f"names differ: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    if odd := [k for k in ours if not same(ours[k], theirs[k])]:
        raise Other(f"{odd[0]} differs")


def expect_specialist(model, name: str, folder: Path) -> None:
    """The same of a specialist of a fused model, up to rows that were cut and the untied head."""
    theirs = tensors_of(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent) as again:
        model.specialist(name).save_pretrained(again)
        ours = tensors_of(Path(again))
    if left := [k for k in theirs.keys() - ours.keys() if not k.endswith("rotary_emb.inv_freq")]:
        raise Other(f"{left[0]} is not used")
    tied = {"lm_head.weight", "embed_out.weight"}
    if made_up := [
        k
        for k in ours.keys() - theirs.keys()
        if k not in tied
        or "true" not in json.dumps(json.loads((folder / "config.json").read_text()).get("tie_word_embeddings"))
    ]:
        raise Other(f"{made_up[0]} is made up")
    for key, tensor in ours.items():
        if key in theirs and not same(tensor, theirs[key][: len(tensor)] if tensor.ndim else theirs[key]):
            raise Other(f"{key} differs")


def configurations(dice: random.Random, base: Path, scratch: Path) -> bool:
    family = dice.choice(FAMILIES)
    if dice.random() < 0.5:
        shutil.copytree(base / family / "code", scratch / "code")
        target = (
            scratch / "code" / dice.choice(("config.json", "config.json", "config.json", "generation_config.json"))
        )
        damage_kind(dice, target) if dice.random() < 0.02 else damage_json(dice, target)
        return _fused_with(dice, base / family / "text", scratch / "code", scratch)
    shutil.copytree(base / family / "fused", scratch / "fused")
    names = ("config.json", "config.json", "config.json", "generation_config.json")
    target = scratch / "fused" / dice.choice(names)
    damage_kind(dice, target) if dice.random() < 0.02 else damage_json(dice, target)
    return _opened(dice, scratch / "fused", scratch)


def weights(dice: random.Random, base: Path, scratch: Path) -> bool:
    family, which = dice.choice(FAMILIES), dice.choice(("code", "code", "fused", "fused", "sharded"))
    folder = scratch / which
    shutil.copytree(base / family / which, folder)
    files = sorted(folder.glob("*.safetensors*"))
    target = dice.choice(files)
    if dice.random() < 0.03:
        damage_kind(dice, target)
    elif target.suffix == ".json":
        damage_json(dice, target)
    else:
        damage_weights(dice, target)
    if which == "code":
        return _fused_with(dice, base / family / "text", folder, scratch)
    return _opened(dice, folder, scratch)


def _fused_with(dice: random.Random, good: Path, folder: Path, scratch: Path) -> bool:
    how = dice.randrange(4)
    if how == 0:
        return quietly(["check", str(good), str(folder)])
    if how == 1:
        if not quietly(["fuse", f"text={good}", f"code={folder}", "--out", str(scratch / "out")]):
            return False
        model = UltraFuserForCausalLM.from_pretrained(scratch / "out")
    else:
        model = in_python(UltraFuserForCausalLM.from_specialists, {"text": good, "code": folder})
        if model is None:
            return False
    expect_specialist(model, "code", folder)
    return True


def _opened(dice: random.Random, folder: Path, scratch: Path) -> bool:
    how = dice.randrange(5)
    if how == 0:
        done = quietly(["explain", str(folder), SAMPLES[0], "--json"])
    elif how == 1:
        done = quietly(["specialist", str(folder), "code", "--out", str(scratch / "out")])
    elif how == 2:
        done = quietly(["explain", str(folder), SAMPLES[0], "--json", "--generate", "4"])
    else:
        done = in_python(UltraFuserForCausalLM.from_pretrained, folder) is not None
    if done:
        expect_files(UltraFuserForCausalLM.from_pretrained(folder), folder, scratch)
    return done


def tokenizers(dice: random.Random, base: Path, scratch: Path) -> bool:
    folder = scratch / "code"
    shutil.copytree(base / "llama" / "code", folder)
    target = folder / dice.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json"))
    damage_kind(dice, target) if dice.random() < 0.02 else damage_json(dice, target)
    if dice.random() < 0.2:
        fused = scratch / "fused"
        shutil.copytree(base / "llama" / "fused", fused, ignore=shutil.ignore_patterns("tokenizer*"))
        for file in folder.glob("tokenizer*"):
            shutil.copy(file, fused) if file.is_file() and not file.is_symlink() else None
        return quietly(["explain", str(fused), SAMPLES[0], "--json"])
    if not _fused_tokenizer(dice, base, folder, scratch):
        return False
    good, bad = (AutoTokenizer.from_pretrained(f) for f in (base / "llama" / "text", folder))
    for text in SAMPLES:
        if good.encode(text, add_special_tokens=False) != bad.encode(text, add_special_tokens=False):
            raise Other(f"{text!r} is split otherwise")
        ids = good.encode(text, add_special_tokens=False)
        if good.backend_tokenizer.decode(ids) != bad.backend_tokenizer.decode(ids):
            raise Other(f"{text!r} is joined otherwise")
    return True


def _fused_tokenizer(dice: random.Random, base: Path, folder: Path, scratch: Path) -> bool:
    good = base / "llama" / "text"
    if dice.random() < 0.5:
        return quietly(["check", str(good), str(folder)])
    return quietly(
        ["fuse", f"text={good}", f"code={folder}", "--chat-template", "text", "--out", str(scratch / "out")]
    )


def adapters(dice: random.Random, base: Path, scratch: Path) -> bool:
    folder, good = scratch / "two", base / "adapters" / "one"
    shutil.copytree(base / "adapters" / "two", folder)
    if dice.random() < 0.6:
        target = folder / "adapter_config.json"
        damage_kind(dice, target) if dice.random() < 0.02 else damage_json(dice, target)
    else:
        target = folder / "adapter_model.safetensors"
        damage_kind(dice, target) if dice.random() < 0.02 else damage_weights(dice, target)
    if dice.random() < 0.3:
        return quietly(["check", str(good), str(folder)])
    model = in_python(UltraFuserForCausalLM.from_specialists, {"one": good, "two": folder})
    if model is None:
        return False
    ids = torch.arange(3, 20)[None]
    try:
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base / "llama" / "text"), folder)
    except Exception:  # noqa: BLE001
        # what PEFT cannot read has been read as its tensors say
        return True
    with torch.no_grad():
        ours, theirs = model.specialist("two")(ids).logits, theirs(ids).logits
    if not torch.allclose(ours, theirs, atol=1e-3 * theirs.abs().max().item(), rtol=1e-3):
        raise Other("PEFT says something else")
    return True


def references(dice: random.Random, base: Path, scratch: Path) -> bool:
    folder = scratch / "refs"
    shutil.copytree(base / "refs", folder)
    target = dice.choice((*[folder / "refs.yaml"] * 5, *sorted(folder.iterdir())))
    if dice.random() < 0.02:
        damage_kind(dice, target)
    elif target.suffix == ".yaml":
        damage_yaml(dice, target)
    elif target.suffix == ".safetensors":
        damage_weights(dice, target)
    else:
        damage_json(dice, target)
    recipe = str(folder / "refs.yaml")
    if dice.random() < 0.3:
        return quietly(["fuse", recipe, "--dry-run"])
    if not quietly(["fuse", recipe, "--out", str(scratch / "out")]):
        return False
    ours, theirs = tensors_of(scratch / "out"), tensors_of(base / "whole")
    if ours.keys() != theirs.keys() or not all(same(ours[k], theirs[k]) for k in ours):
        raise Other("the weights are others")
    for file in ("config.json", "tokenizer.json"):
        if (scratch / "out" / file).read_bytes() != (base / "whole" / file).read_bytes():
            raise Other(f"{file} is another")
    return True


def recipes(dice: random.Random, base: Path, scratch: Path) -> bool:
    name = dice.choice(("fuse.yaml", "train.yaml", "gate.yaml", "joint.yaml", "ultrachat.yaml", "ultrachat_tiny.yaml"))
    target = Path(shutil.copy(base / "recipes" / name, scratch))
    damage_kind(dice, target) if dice.random() < 0.02 else damage_yaml(dice, target)
    if name == "fuse.yaml":
        return quietly(["fuse", str(target), "--dry-run"])
    if name.startswith("ultrachat"):
        return quietly(["data", "plan", str(target)])
    words = ["train", str(target), "--out", str(scratch / "out"), "--max-steps", "1"]
    if name == "train.yaml":
        return quietly(words) and in_python(UltraFuserForCausalLM.from_pretrained, scratch / "out") is not None
    # what it names is not there, so that it ends before anything is trained
    return quietly([*words, "--model", str(scratch / "none")])


RUN = {run.__name__: run for run in (configurations, weights, tokenizers, adapters, references, recipes)}


def outcome(kind: str, seed: int, number: int, base: Path) -> dict:
    """What becomes of one mutation."""
    dice, start = random.Random(f"{kind} {seed} {number}"), sum(os.times()[:4])
    found = {"kind": kind, "number": number}
    here, environment = os.getcwd(), dict(os.environ)
    with tempfile.TemporaryDirectory(dir=base.parent) as scratch:
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                os.chdir(scratch)
                found["outcome"] = "right" if RUN[kind](dice, base, Path(scratch)) else "words"
        except Other as error:
            found |= {"outcome": "other", "why": str(error)}
        except MemoryError as error:
            found |= {"outcome": "memory", "why": str(error)}
        except Inside as error:
            found |= {"outcome": "inside", "why": str(error)}
        except Exception as error:  # noqa: BLE001, what is done with the outcome is a part of the outcome
            found |= {"outcome": "inside", "why": "".join(traceback.format_exception(error))[-3000:]}
        finally:
            os.chdir(here)
            os.environ.clear()
            os.environ.update(environment)
    # by the processor, because others may be at work beside this
    found["seconds"] = round(sum(os.times()[:4]) - start, 2)
    if found["seconds"] > SECONDS:
        found["outcome"] = "slow"
    return found


# ---------------------------------------------------------------------------------- all of them


def _work(tasks: list[tuple[str, int]], seed: int, base: Path, journal: Path) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + BYTES, resource.RLIM_INFINITY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with journal.open("a") as file:
        for kind, number in tasks:
            file.write(json.dumps({"begun": [kind, number], "at": time.time()}) + "\n")
            file.flush()
            file.write(json.dumps(outcome(kind, seed, number, base)) + "\n")
            file.flush()


def _read(journal: Path) -> list[dict]:
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []


def _watched(tasks: list[tuple[str, int]], seed: int, base: Path, journal: Path) -> None:
    """Runs tasks in a process that is started anew whenever one of them takes too long or kills it."""
    while True:
        lines = _read(journal)
        done = {(line["kind"], line["number"]) for line in lines if "outcome" in line}
        left = [task for task in tasks if task not in done]
        if not left:
            return
        process = get_context("fork").Process(target=_work, args=(left[:200], seed, base, journal))
        process.start()
        why = "dead"
        while process.is_alive():
            process.join(1)
            last = (_read(journal) or [{}])[-1]
            if "begun" in last and time.time() - last["at"] > SECONDS_BY_CLOCK:
                process.kill()
                process.join()
                why = "slow"
        last = (_read(journal) or [{}])[-1]
        if "begun" in last:
            kind, number = last["begun"]
            with journal.open("a") as file:
                file.write(
                    json.dumps({"kind": kind, "number": number, "outcome": why, "seconds": SECONDS_BY_CLOCK}) + "\n"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutations", type=int, default=2000, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=None, help="folder for what is done; run again, it goes on")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    work = args.work or Path(tempfile.gettempdir()) / f"ultrafuser-fuzz-{args.seed}"
    base = work / "base"
    if not (base / "done").exists():
        shutil.rmtree(base, ignore_errors=True)
        build(base)
        (base / "done").touch()
    tasks = [(kind, number) for number in range(args.mutations) for kind in args.kinds]
    watchers = []
    # a thread would do, if forking beside threads were safe
    for k in range(args.workers):
        own = (tasks[k :: args.workers], args.seed, base, work / f"journal-{k}-of-{args.workers}.jsonl")
        watchers.append(get_context("fork").Process(target=_watched, args=own))
        watchers[-1].start()
    for watcher in watchers:
        watcher.join()
    lines = [line for k in range(args.workers) for line in _read(work / f"journal-{k}-of-{args.workers}.jsonl")]
    lines = [
        line for line in lines if "outcome" in line and line["kind"] in args.kinds and line["number"] < args.mutations
    ]
    counts = {
        kind: {o: sum(line["kind"] == kind and line["outcome"] == o for line in lines) for o in OUTCOMES}
        for kind in args.kinds
    }
    slowest = max((line["seconds"] for line in lines), default=0)
    result = {"seed": args.seed, "mutations": args.mutations, "slowest_seconds": slowest, "counts": counts}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(counts, indent=1))
    failures = [line for line in lines if line["outcome"] not in ("right", "words")]
    for line in failures[:50]:
        print(line["kind"], line["number"], line["outcome"], line.get("why", "")[-600:], file=sys.stderr)
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
