"""Ways to damage files: values, types, bytes, tensors."""

import contextlib
import copy
import dataclasses
import json
import os
import random
import struct
from pathlib import Path

import yaml
from peft import LoraConfig
from transformers import (
    GenerationConfig,
    LlamaConfig,
    MixtralConfig,
)

import tests.conftest  # noqa: F401
from trainers.stage_config import StageConfig


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
