"""Specialists in one GGUF file, dequantised while they are read, and quantised ones that are refused with a way out."""

import json
import os
import re
import struct

import pytest
import torch
from transformers import set_seed
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM, common_tokenizer
from tests.support.gguf_files import write
from tests.support.mixes import prompt
from tests.support.tiny import specialist, tokenizer
from ultrafuser.cli.app import app


pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, its GGUF file and its folder."""
    set_seed(0)
    path = tmp_path_factory.mktemp("made")
    model = specialist("llama")
    tokenizer().save_pretrained(path)
    model.save_pretrained(path / "folder")
    tokenizer().save_pretrained(path / "folder")
    return model, write(path / "file.gguf", model), path / "folder"


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_gguf_file_is_a_specialist_that_says_what_its_model_says(family, tmp_path):
    set_seed(0)
    model = specialist(family)
    tokenizer().save_pretrained(tmp_path)
    file = write(tmp_path / "file.gguf", model)
    fused = UltraFuserForCausalLM.from_specialists({"text": file, "code": model}, dtype="float32")
    ids = prompt()
    with torch.no_grad():
        torch.testing.assert_close(fused.specialist("text")(ids).logits, model(ids).logits)
    fused.save_pretrained(tmp_path / "fused")
    again = UltraFuserForCausalLM.from_pretrained(tmp_path / "fused")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, fused(ids).logits)
    assert fused.generation_config.eos_token_id == 2
    assert common_tokenizer({"text": file, "code": tokenizer()})("ab").input_ids == tokenizer()("ab").input_ids


def test_quantised_weights_are_made_plain_while_they_are_read(tmp_path):
    set_seed(0)
    model = specialist("llama")
    tokenizer().save_pretrained(tmp_path)
    file = write(tmp_path / "file.gguf", model, quantised=True)
    fused = UltraFuserForCausalLM.from_specialists({"text": file, "code": model}, dtype="float32")
    weight = fused.specialist("text").model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.float32
    # eight bits of the largest in a block of 32
    assert 0 < (weight - model.model.layers[0].mlp.up_proj.weight).abs().max() < 0.01


@pytest.mark.e2e
def test_check_fuse_and_refer_take_a_gguf_file(made, tmp_path):
    _, file, folder = made
    given = [f"text={file}", f"code={folder}"]
    found = CliRunner().invoke(app, ["check", *given, "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["numbers"]["dtype"] == "float32"
    done = CliRunner().invoke(app, ["fuse", *given, "--out", str(tmp_path / "fused")])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["refer", str(tmp_path / "fused"), "--out", str(tmp_path / "refs")])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["fuse", str(tmp_path / "refs" / "refs.yaml"), "--out", str(tmp_path / "again")])
    assert done.exit_code == 0, done.output
    names = ("model.safetensors", "config.json", "tokenizer.json")
    assert all((tmp_path / "fused" / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)


@pytest.mark.parametrize("fault", ["missing", "another format", "cut", "no package", "no tokenizer"])
def test_a_gguf_file_that_cannot_be_read_is_refused_with_a_way_out(fault, made, tmp_path, monkeypatch):
    _, whole, folder = made
    file = tmp_path / "file.gguf"
    if fault != "missing":
        file.write_bytes({"another format": b"PK", "cut": whole.read_bytes()[:300]}.get(fault, whole.read_bytes()))
    if fault == "no package":
        monkeypatch.setattr("modeling_ultrafuser.gguf_ultrafuser.is_gguf_available", lambda: False)
    words = {
        "missing": "is not there. .*hf download",
        "another format": "begins with b'PK'.*begins with the letters GGUF",
        "cut": "file.gguf' is not whole: at byte 300 it announces 4 more, and 0 are left",
        "no package": r'package `gguf` is not installed.*pip install "ultrafuser\[gguf\]"',
        "no tokenizer": "The tokenizer of .* cannot be read .*Save the one that it was made from beside the file",
    }[fault]
    with pytest.raises((ValueError, OSError, ImportError), match=words):
        UltraFuserForCausalLM.from_specialists({"text": file, "code": folder})
    shown = CliRunner().invoke(app, ["check", f"text={file}", f"code={folder}"])
    assert shown.exit_code == 2, shown.output
    assert "blocks" in shown.output


def _lying(fault: str, path) -> bytes:
    """A whole GGUF file's bytes with one lie."""
    raw = path.read_bytes()

    def swapped(before: bytes, after: bytes) -> bytes:
        assert raw.count(before) == 1, before
        return raw.replace(before, after)

    def key(name: str, kind: int) -> bytes:
        return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind)

    whole, listed = key("llama.block_count", 4), key("tokenizer.ggml.tokens", 9)
    layers = whole + struct.pack("<I", specialist("llama").config.num_hidden_layers)
    tokens = raw[(at := raw.index(listed)) : at + len(listed) + 12]
    norm = struct.pack("<Q", 18) + b"output_norm.weight" + struct.pack("<IQI", 1, 32, 0)
    return {
        "cut in its tensors": raw[:-5000],
        "a tensor more announced": raw[:8] + struct.pack("<Q", struct.unpack_from("<Q", raw, 8)[0] + 1) + raw[16:],
        "tensors without end": raw[:8] + struct.pack("<Q", 1 << 60) + raw[16:],
        "fields without end": raw[:16] + struct.pack("<Q", 1 << 60) + raw[24:],
        "a list without end": swapped(tokens, listed + struct.pack("<IQ", 8, 1 << 60)),
        "lists in lists": swapped(tokens, listed + struct.pack("<IQ", 9, 1)),
        "a billion layers": swapped(layers, whole + struct.pack("<I", 10**9)),
        "a layer less": swapped(layers, whole + struct.pack("<I", 1)),
        "a vector of another size": swapped(norm, norm[:-12] + struct.pack("<QI", 1 << 40, 0)),
        "another version": raw[:4] + struct.pack("<I", 9) + raw[8:],
    }[fault]


@pytest.mark.grid
@pytest.mark.parametrize(
    ("fault", "words"),
    {
        "cut in its tensors": "a broken download",
        "a tensor more announced": "is of kind|it announces|starts at byte",
        "tensors without end": "is of kind|it announces|starts at byte",
        "fields without end": "it announces|of kind|twice",
        "a list without end": "a list of 1,152,921,504,606,846,976 values, and 4,194,304 are read at most",
        "lists in lists": "a value of kind 9",
        "a billion layers": "announces 1,000,000,000 layers, and 21 tensors in all",
        "a layer less": "holds [0-9,]+ numbers, and its metadata asks for [0-9,]+",
        "a vector of another size": "starts at byte [0-9,]+, where [0-9,]+ is expected|tensors end at byte",
        "another version": "is of version 9, and versions 2 and 3 are read",
    }.items(),
)
def test_a_gguf_file_that_lies_is_refused_by_name_before_anything_is_loaded(fault, words, made, tmp_path, monkeypatch):
    _, whole, folder = made
    file = tmp_path / "file.gguf"
    file.write_bytes(_lying(fault, whole))
    tokenizer().save_pretrained(tmp_path)
    given = [f"text={file}", f"code={folder}"]
    for command in (["check", *given], ["fuse", *given, "--out", str(tmp_path / "fused")]):
        shown = CliRunner().invoke(app, command)
        assert shown.exit_code == 2, shown.output
        flat = "".join(shown.output.split())
        assert "file.gguf" in flat
        assert "Traceback" not in flat
        assert re.search("".join(words.split()), flat), shown.output
    # what is asked for when weights are loaded
    monkeypatch.setattr("modeling_ultrafuser.fusing_ultrafuser.dequantised", None)
    with pytest.raises(ValueError, match=words):
        UltraFuserForCausalLM.from_specialists({"text": file, "code": folder})


def test_a_gguf_file_with_a_tensor_that_no_layer_reads_is_refused(tmp_path):
    set_seed(0)
    model = specialist("llama")
    tokenizer().save_pretrained(tmp_path)
    for extra, words in {
        "rope_freqs.weight": "`rope_freqs.weight` of .*file.gguf', 'text', scales rotary positions",
        "blk.0.attn_q.bias": "holds [0-9,]+ numbers, and its metadata asks for [0-9,]+",
    }.items():
        file = write(tmp_path / "file.gguf", model, extra={extra: torch.ones(4)})
        with pytest.raises(ValueError, match=words):
            UltraFuserForCausalLM.from_specialists({"text": file, "code": model}, dtype="float32")


def test_a_gguf_file_whose_tensor_has_another_name_is_refused_and_not_made_up(tmp_path):
    set_seed(0)
    model = specialist("llama")
    tokenizer().save_pretrained(tmp_path)
    file = write(tmp_path / "file.gguf", model)
    file.write_bytes(file.read_bytes().replace(b"output_norm.weight", b"output_morn.weight"))
    with pytest.raises(ValueError, match="missing, such as `model.norm.weight`"):
        UltraFuserForCausalLM.from_specialists({"text": file, "code": model}, dtype="float32")


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_no_gguf_file(kind, made, tmp_path):
    file = tmp_path / "file.gguf"
    os.mkfifo(file) if kind == "pipe" else file.mkdir()
    with pytest.raises(ValueError, match="file.gguf' is no ordinary file"):
        UltraFuserForCausalLM.from_specialists({"text": file, "code": made[2]})


def test_another_file_is_no_specialist(made, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="is the file .*of files alone GGUF is read"):
        UltraFuserForCausalLM.from_specialists({"text": file, "code": made[2]})


@pytest.mark.parametrize(
    ("method", "way_out"),
    [
        ("mxfp4", r"Mxfp4Config\(dequantize=True\)\)\.save_pretrained"),
        ("fp8", r"FineGrainedFP8Config\(dequantize=True\)\)\.save_pretrained"),
        ("awq", r"`model\.dequantize\(\)`"),
    ],
)
def test_a_quantised_folder_is_refused_with_a_way_out_of_its_own(method, way_out, made, tmp_path):
    model, _, folder = made
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(ValueError, match=f"quantised weights. .*{way_out}"):
        UltraFuserForCausalLM.from_specialists({"text": tmp_path, "code": folder})


def test_a_model_in_memory_that_was_read_from_gguf_is_fused_if_it_is_plain(made):
    from transformers import AutoModelForCausalLM

    from modeling_ultrafuser.gguf_ultrafuser import dequantised, gguf_arguments

    model, file, _ = made
    where, name = gguf_arguments(file)
    plain = AutoModelForCausalLM.from_pretrained(where, **name, **dequantised(), dtype="float32")
    fused = UltraFuserForCausalLM.from_specialists({"text": plain, "code": model})
    ids = prompt()
    with torch.no_grad():
        torch.testing.assert_close(fused.specialist("text")(ids).logits, model(ids).logits)
