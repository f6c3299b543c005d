"""Folders, references and recipes as a stranger may send them: the model that they say, or a sentence; never another."""

import json
import os
import shutil
import signal
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.folder_ultrafuser import check_folder
from tests import fuzz
from tests.support.fuzz_inputs import build
from tests.support.strange_folders import config, copied, edited, make_zoo, said, tensors


@pytest.fixture(autouse=True)
def no_hang():
    """A pipe that is opened, or a name that is matched, may never end."""
    signal.alarm(120)
    yield
    signal.alarm(0)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return make_zoo(tmp_path_factory.mktemp("zoo"))


def raw(change):
    """A change of the bytes of a folder's one file."""

    def apply(folder):
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return apply


def header(change):
    def apply(data):
        length = struct.unpack("<Q", data[:8])[0]
        found = json.loads(data[8 : 8 + length])
        change(found)
        written = json.dumps(found).encode()
        return struct.pack("<Q", len(written)) + written + data[8 + length :]

    return raw(apply)


def text(file, written):
    return lambda folder: (folder / file).write_text(written)


def instead(file, make):
    """Something else in a file's place."""

    def apply(folder):
        (folder / file).unlink()
        make(folder / file)

    return apply


def rotary(**fields):
    return edited("config.json", lambda c: c["rope_parameters"].update(fields))


Q = "model.layers.0.self_attn.q_proj.weight"


TENFOLD = {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 10}


GROWING = {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [TENFOLD] * 6}] * 2}


GROWN = {"type": "Sequence", "decoders": [{**TENFOLD, "pattern": {"String": "a"}}] * 12}


# what a specialist's folder may be, and what is said of it
SPECIALISTS = {
    "a tensor missing": (tensors(lambda s: s.pop(Q)), "1 are missing, such as"),
    "the head missing": (tensors(lambda s: s.pop("lm_head.weight")), "such as `lm_head.weight`"),
    "a tensor renamed": (tensors(lambda s: s.update({Q + "2": s.pop(Q)})), "have no place in the model"),
    "a tensor more": (tensors(lambda s: s.update({"extra": torch.ones(2)})), "such as `extra`"),
    "a layer fewer by config.json": (config(num_hidden_layers=1), "have no place in the model"),
    "a layer more by config.json": (config(num_hidden_layers=3), "are missing"),
    "no layers": (config(num_hidden_layers=0), "have no place in the model"),
    "a million layers": (config(num_hidden_layers=10**6), "number of layers"),
    "a thousand layers": (config(num_hidden_layers=1000), "1,000 layers by its config.json, and 21 tensors"),
    "layers as a word": (config(num_hidden_layers="two"), "number of layers"),
    "layers as no number": (config(num_hidden_layers=float("nan")), "number of layers"),
    "fewer layers than none": (config(num_hidden_layers=-1), "number of layers"),
    "another architecture": (config(model_type="gpt2"), "code"),
    "no tensor at all": (lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}"), "tensors"),
    "integers": (tensors(lambda s: s.update({Q: s[Q].int()})), "is I32 in its files"),
    "small integers": (tensors(lambda s: s.update({Q: s[Q].to(torch.int8)})), "is I8 in its files"),
    "integers more": (tensors(lambda s: s.update({"extra": torch.ones(2).int()})), "such as `extra`"),
    "a shape turned": (
        tensors(lambda s: s.update({"lm_head.weight": s["lm_head.weight"].T.contiguous()})),
        "has shape",
    ),
    "no numbers": (tensors(lambda s: s["lm_head.weight"][-1].fill_(float("nan"))), "must be finite"),
    "infinite numbers": (tensors(lambda s: s[Q][0].fill_(float("inf"))), "must be finite"),
    "cut off a little": (raw(lambda b: b[:-1000]), "a broken download"),
    "bytes behind it": (raw(lambda b: b + b"more"), "a broken download"),
    "tensors that overlap": (
        header(lambda h: h[Q].update(data_offsets=h["model.norm.weight"]["data_offsets"])),
        "whole",
    ),
    "an unknown type": (header(lambda h: h[Q].update(dtype="F99")), "whole"),
    "a header of nothing": (lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"null"), "object"),
    "a header without end": (raw(lambda b: struct.pack("<Q", 1 << 62) + b[8:]), "its header should have"),
    "other weights, named": (config(transformers_weights="other.safetensors"), "names other files"),
    "another config.json, named": (config(configuration_files=["config.5.0.0.json"]), "names other files"),
    "shards that are loaded in its place": (
        lambda f: shutil.copy(f / "model.safetensors", f / "shard-00001-model-00001-of-00001.safetensors"),
        "load in its place",
    ),
    "an adapter beside it": (text("adapter_config.json", '{"peft_type": "LORA"}'), "put into it"),
    "no context": (config(max_position_embeddings=-1), "The longest context"),
    "vocabulary as a word": (config(vocab_size="304"), "vocab_size"),
    "a soft cap that is an object": (
        config(final_logit_softcapping={"a": 1}),
        "`final_logit_softcapping` of ",
    ),
    "a soft cap beyond all numbers": (
        config(final_logit_softcapping=10**400),
        "`final_logit_softcapping` of ",
    ),
    "a scale that is a word": (config(logits_scaling="x"), "`logits_scaling` of "),
    "another scale that is a list": (config(logit_scale=[1]), "`logit_scale` of "),
    "a negative number of heads": (config(num_attention_heads=-4), "`num_attention_heads` of "),
    "heads in a word": (config(num_key_value_heads="two"), "`num_key_value_heads` of "),
    "a window that is an object": (config(sliding_window={"a": 1}), "`sliding_window` of "),
    "a window beyond all numbers": (config(sliding_window=10**400), "`sliding_window` of "),
    "a tokenizer that multiplies text": (
        edited("tokenizer.json", lambda t: t.update(normalizer=GROWING)),
        "times as long",
    ),
    "a tokenizer that multiplies answers": (
        edited("tokenizer.json", lambda t: t.update(decoder=GROWN)),
        "times as long",
    ),
    "no heads": (config(num_attention_heads=0), "cannot be read"),
    "an activation that is none": (config(hidden_act="fast"), "cannot be read"),
    "a rotary base that is a list": (rotary(rope_theta=[1e4]), "cannot be read"),
    "a rotary kind that is a number": (rotary(rope_type=2), "cannot be read"),
    "an odd type": (config(dtype="float99"), "cannot be read"),
    "an odd architecture": (config(architectures=[{}]), "a list of words"),
    "an odd end": (edited("generation_config.json", lambda c: c.update(eos_token_id=[None])), "a token's number"),
    "an end in lists": (edited("generation_config.json", lambda c: c.update(eos_token_id=[[2]])), "a token's number"),
    "an end without end": (edited("config.json", lambda c: c.update(eos_token_id=10**400)), "a token's number"),
    "a configuration of nothing": (text("config.json", "null"), "instead of an object"),
    "a configuration cut off": (text("config.json", '{"model_type": "lla'), "does not hold JSON"),
    "a configuration without bottom": (text("config.json", "[" * 100_000), "nested too deeply"),
    "a configuration of many levels": (text("config.json", '{"a":' * 500 + "1" + "}" * 500), "levels"),
    "a huge configuration": (lambda f: os.truncate(f / "config.json", 1 << 40), "has at most"),
    "a pipe for weights": (instead("model.safetensors", os.mkfifo), "Only ordinary files"),
    "a device for a configuration": (
        instead("config.json", lambda p: p.symlink_to("/dev/zero")),
        "Only ordinary files",
    ),
    "a pipe for a tokenizer": (instead("tokenizer.json", os.mkfifo), "Only ordinary files"),
    "a tokenizer of nothing": (text("tokenizer.json", "null"), "instead of an object"),
    "a tokenizer of other parts": (text("tokenizer.json", "{}"), "The tokenizer"),
    "a length that is a word": (
        edited("tokenizer_config.json", lambda c: c.update(model_max_length="x")),
        "The tokenizer",
    ),
    "a token far off": (
        edited("tokenizer.json", lambda t: t["model"]["vocab"].update(far=2**31)),
        "the gaps would fill",
    ),
    "an added token far off": (
        edited("tokenizer.json", lambda t: t["added_tokens"][0].update(id=4_000_000_000)),
        "the gaps would fill",
    ),
    "a merge to no token": (edited("tokenizer.json", lambda t: t["model"]["vocab"].pop("Ġbrown")), "The tokenizer"),
    "other merges": (edited("tokenizer.json", lambda t: t["model"]["merges"].pop()), "differ in merges"),
    "another normaliser": (
        edited("tokenizer.json", lambda t: t.update(normalizer={"type": "NFKC"})),
        "differ in normalizer",
    ),
    "another splitter": (
        edited("tokenizer.json", lambda t: t["pre_tokenizer"].update(add_prefix_space=True)),
        "differ in pre_tokenizer",
    ),
    "another joiner": (edited("tokenizer.json", lambda t: t.update(decoder={"type": "Fuse"})), "differ in decoder"),
}


@pytest.mark.grid
@pytest.mark.parametrize("case", SPECIALISTS)
def test_a_specialist_that_is_not_what_its_files_say_is_refused_by_check_and_fuse(case, zoo, tmp_path):
    change, words = SPECIALISTS[case]
    given = copied(zoo, "code", tmp_path)
    change(given)
    if words != "must be finite":  # which only the numbers tell
        found = said(2, "check", zoo / "text", given)
        assert words in found
        assert "can be fused" not in found
    assert words in said(2, "fuse", f"text={zoo}/text", f"code={given}", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.grid
@pytest.mark.parametrize("case", ["a tensor missing", "integers", "an adapter beside it", "other merges", "no layers"])
def test_it_is_refused_on_every_other_way_in_too(case, zoo, tmp_path):
    change, words = SPECIALISTS[case]
    given = copied(zoo, "code", tmp_path)
    change(given)
    assert words in said(2, "add", zoo / "fused", f"more={given}", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match=words):
        UltraFuserForCausalLM.from_specialists({"text": zoo / "text", "code": given})


G = "model.specialists.code.layers.1.self_attn.q_proj.weight"


FUSED = {
    "a tensor missing": (tensors(lambda s: s.pop(G)), "1 are missing, such as"),
    "the head missing": (tensors(lambda s: s.pop("lm_head.weight")), "such as `lm_head.weight`"),
    "the gate missing": (
        tensors(lambda s: [s.pop(k) for k in list(s) if "fusion_gate" in k]),
        "are missing, such as `model.fusion_gate",
    ),
    "a tensor more": (tensors(lambda s: s.update({"extra": torch.ones(2)})), "such as `extra`"),
    "integers": (tensors(lambda s: s.update({G: s[G].int()})), "is I32 in its files"),
    "another gate by config.json": (config(gate="linear"), "fusion_gate"),
    "another width by config.json": (config(gate_hidden_size=8), "has shape"),
    "a layer more by config.json": (
        edited("config.json", lambda c: c["specialists"][0].update(num_hidden_layers=3)),
        "missing",
    ),
    "a thousand layers": (
        edited("config.json", lambda c: c["specialists"][0].update(num_hidden_layers=1000)),
        "layers",
    ),
    "a huge vocabulary": (config(vocab_size=10**9), "has shape"),
    "no specialists": (config(specialists="x"), "a list of names and a list of configurations"),
    "an odd specialist": (config(specialists=["x", "y"]), "a list of names and a list of configurations"),
    "an odd end": (edited("generation_config.json", lambda c: c.update(eos_token_id={})), "a token's number"),
    "cut off": (raw(lambda b: b[:-5000]), "a broken download"),
    "a tokenizer of nothing": (text("tokenizer.json", "[]"), "instead of an object"),
    "an adapter beside it": (text("adapter_config.json", '{"peft_type": "LORA"}'), "put into it"),
    "odd origins": (text("specialists.json", '{"text": 5}'), "where it comes from"),
}


@pytest.mark.grid
@pytest.mark.parametrize("case", FUSED)
def test_a_fused_folder_that_is_not_what_its_files_say_is_opened_by_no_command(case, zoo, tmp_path):
    change, words = FUSED[case]
    given = copied(zoo, "fused", tmp_path)
    change(given)
    if "origins" not in case:
        assert words in said(2, "explain", given, "hello there")
        assert words in said(2, "specialist", given, "code", "--out", tmp_path / "out")
    if "tokenizer" not in case and "origins" not in case:
        with pytest.raises(ValueError, match=words):
            UltraFuserForCausalLM.from_pretrained(given)
        with pytest.raises(ValueError, match=words):
            AutoModelForCausalLM.from_pretrained(given)
    assert words in said(2, "add", given, f"more={zoo}/code", "--out", tmp_path / "out")


SHARDS = {
    "a file above it": (lambda n: f"../{n}", "names safetensors files of its own folder"),
    "a file anywhere": (lambda n: f"/etc/{n}", "names safetensors files of its own folder"),
    "a number": (lambda n: 5, "names safetensors files of its own folder"),
    "a file that is not there": (lambda n: "none.safetensors", "none.safetensors"),
}


@pytest.mark.parametrize("case", SHARDS)
def test_an_index_names_files_of_its_folder(case, zoo, tmp_path):
    change, words = SHARDS[case]
    given = copied(zoo, "shards", tmp_path)
    for file in given.glob("*.safetensors"):
        shutil.copy(file, given.parent)
    edited(
        "model.safetensors.index.json",
        lambda i: i["weight_map"].update({k: change(n) for k, n in list(i["weight_map"].items())[:1]}),
    )(given)
    assert words in said(2, "explain", given, "hello there")
    with pytest.raises((ValueError, OSError), match=words):
        UltraFuserForCausalLM.from_pretrained(given)


def test_a_tensor_in_two_files_is_refused(zoo, tmp_path):
    given = copied(zoo, "shards", tmp_path)
    one, other, *_ = sorted(given.glob("*.safetensors"))
    save_file(load_file(one) | load_file(other), one, {"format": "pt"})
    with pytest.raises(ValueError, match="is in '.*', too"):
        UltraFuserForCausalLM.from_pretrained(given)


# ---------------------------------------------------------------------------------- adapters


ADAPTERS = {
    "a pattern that takes for ever": ({"alpha_pattern": {"(.*.*)*=$": 1}}, "repeats a group"),
    "a pattern of many stars": ({"alpha_pattern": {".*.*.*.*.*.*.*=$": 1}}, "more than 3 times"),
    "a pattern that is none": ({"alpha_pattern": {"q_proj[": 1}}, "is none"),
    "patterns that are a list": ({"alpha_pattern": ["q_proj"]}, "as PEFT writes it"),
    "a scale that is a word": ({"lora_alpha": "x"}, "as PEFT writes it"),
    "a scale beyond all numbers": ({"lora_alpha": 10**400}, "as PEFT writes it"),
    "a scale of some layers beyond all numbers": ({"alpha_pattern": {"q_proj": 10**400}}, "as PEFT writes it"),
    "a scale that is no number": ({"lora_alpha": float("nan")}, "as PEFT writes it"),
    "another rank": ({"r": 3}, "of the rank"),
    "a base that is a number": ({"base_model_name_or_path": 5}, "adapter"),
    "another layer": ({"target_modules": ["v_proj"]}, "target_modules"),
    "layers by no name": ({"target_modules": None}, "target_modules"),
    "no layers": ({"target_modules": []}, "target_modules"),
    "one layer by its number": ({"layers_to_transform": [0]}, "layers_to_transform"),
    "layers of another list": ({"layers_to_transform": [0, 1], "layers_pattern": "h"}, "layers_to_transform"),
    "a layer by a word": ({"layers_to_transform": "0"}, "as PEFT writes it"),
    "another method without settings": ({"kasa_config": {}}, "kasa_config"),
    "a layer left out": ({"exclude_modules": ["q_proj"]}, "exclude_modules"),
    "a target that takes for ever": ({"target_modules": "(.*.*)*=$"}, "repeats a group"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_that_is_not_what_its_files_say_is_refused(case, zoo, tmp_path):
    fields, words = ADAPTERS[case]
    given = copied(zoo, "two", tmp_path)
    edited("adapter_config.json", lambda c: c.update(fields))(given)
    assert words in said(2, "check", zoo / "one", given)
    with pytest.raises(ValueError, match=words):
        UltraFuserForCausalLM.from_specialists({"one": zoo / "one", "two": given})


# ---------------------------------------------------------------------------------- at random


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "base"
    build(folder)
    return folder


@pytest.mark.e2e
@pytest.mark.grid
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_whatever_is_damaged_at_random_ends_right_or_in_words(kind, base):
    found = [fuzz.outcome(kind, 0, number, base) for number in range(10)]
    assert {f["outcome"] for f in found} <= {"right", "words"}, [f for f in found if "why" in f]


def test_gaps_between_tokens_and_tokens_in_a_list_are_taken(tmp_path):
    file = tmp_path / "tokenizer.json"
    listed = {"model": {"vocab": [["a", -1.0]] * 200_000}, "added_tokens": [{"id": 250_000, "content": "b"}]}
    for content in (listed, {"model": {"vocab": {"a": 0, "b": 99_999}}}, {"model": {"vocab": {}}, "added_tokens": []}):
        file.write_text(json.dumps(content))
        check_folder(tmp_path)


def test_fields_that_only_begin_as_a_setting_does_are_taken(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rembert", "output_embedding_size": 1664}))
    check_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"output_attentions": 1664}))
    with pytest.raises(ValueError, match="`output_attentions` of .* It is true or false"):
        check_folder(tmp_path)
