"""Folders, references and recipes as a stranger may send them: the model that they say, or a sentence; never another."""

import json
import os
import shutil
import signal
import struct
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, set_seed
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM, UltraFuserModel, common_tokenizer
from modeling_ultrafuser.folder_ultrafuser import check_folder
from modeling_ultrafuser.modeling_ultrafuser import UltraFuserPreTrainedModel
from tests import fuzz
from tests.support.tiny import specialist
from ultrafuser.build.references import sha256
from ultrafuser.cli.app import app


IDS = torch.arange(3, 20)[None]


@pytest.fixture(autouse=True)
def no_hang():
    """A pipe that is opened, or a name that is matched, may never end."""
    signal.alarm(120)
    yield
    signal.alarm(0)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Two specialists over one tokenizer with merges, their fused model in one file and in several, and adapters."""
    folder = tmp_path_factory.mktemp("zoo")
    set_seed(0)
    words = fuzz._tokenizer()
    for name in ("text", "code"):
        specialist(layers=2, hidden_size=16, vocab_size=fuzz.ROWS).save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    assert said(0, "fuse", f"text={folder}/text", f"code={folder}/code", "--out", folder / "fused")
    UltraFuserForCausalLM.from_pretrained(folder / "fused").save_pretrained(folder / "shards", max_shard_size="20KB")
    words.save_pretrained(folder / "shards")
    for name in ("one", "two"):
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "text"), config).save_pretrained(folder / name)
    return folder


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


def edited(file, change):
    """A change of a JSON file."""

    def apply(folder):
        found = json.loads((folder / file).read_text())
        change(found)
        (folder / file).write_text(json.dumps(found))

    return apply


def text(file, written):
    return lambda folder: (folder / file).write_text(written)


def instead(file, make):
    """Something else in a file's place."""

    def apply(folder):
        (folder / file).unlink()
        make(folder / file)

    return apply


def config(**fields):
    return edited("config.json", lambda c: c.update(fields))


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
        "`final_logit_softcapping` is a number",
    ),
    "a soft cap beyond all numbers": (
        config(final_logit_softcapping=10**400),
        "`final_logit_softcapping` is a number",
    ),
    "a scale that is a word": (config(logits_scaling="x"), "`logits_scaling` is a number"),
    "another scale that is a list": (config(logit_scale=[1]), "`logit_scale` is a number"),
    "a negative number of heads": (config(num_attention_heads=-4), "`num_attention_heads` is a number"),
    "heads in a word": (config(num_key_value_heads="two"), "`num_key_value_heads` is a number"),
    "a window that is an object": (config(sliding_window={"a": 1}), "`sliding_window` is a number"),
    "a window beyond all numbers": (config(sliding_window=10**400), "`sliding_window` is a number"),
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
    "a configuration of nothing": (text("config.json", "null"), "must hold an object"),
    "a configuration cut off": (text("config.json", '{"model_type": "lla'), "must hold JSON"),
    "a configuration without bottom": (text("config.json", "[" * 100_000), "nested too deeply"),
    "a configuration of many levels": (text("config.json", '{"a":' * 500 + "1" + "}" * 500), "levels"),
    "a huge configuration": (lambda f: os.truncate(f / "config.json", 1 << 40), "has at most"),
    "a pipe for weights": (instead("model.safetensors", os.mkfifo), "Only ordinary files"),
    "a device for a configuration": (
        instead("config.json", lambda p: p.symlink_to("/dev/zero")),
        "Only ordinary files",
    ),
    "a pipe for a tokenizer": (instead("tokenizer.json", os.mkfifo), "Only ordinary files"),
    "a tokenizer of nothing": (text("tokenizer.json", "null"), "must hold an object"),
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
    "a tokenizer of nothing": (text("tokenizer.json", "[]"), "must hold an object"),
    "an adapter beside it": (text("adapter_config.json", '{"peft_type": "LORA"}'), "put into it"),
    "odd origins": (text("specialists.json", '{"text": 5}'), "where it comes from"),
}


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


# ---------------------------------------------------------------------------------- what is no mistake


def test_the_backbone_alone_leaves_the_head_and_a_head_for_values_where_they_are(zoo, tmp_path):
    given = copied(zoo, "fused", tmp_path)
    tensors(lambda s: s.update({"v_head.summary.weight": torch.ones(1, 32)}))(given)
    assert UltraFuserModel.from_pretrained(given)(IDS).last_hidden_state.shape[-1] == 32
    assert AutoModel.from_pretrained(given).config.specialist_names == ["text", "code"]
    assert UltraFuserForCausalLM.from_pretrained(given)(IDS).logits.equal(
        UltraFuserForCausalLM.from_pretrained(zoo / "fused")(IDS).logits
    )


def test_a_class_with_a_head_of_its_own_gets_a_new_one(zoo, tmp_path):
    class Scored(UltraFuserPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.model = UltraFuserModel(config)
            self.score = nn.Linear(config.hidden_size, 1)
            self.post_init()

    scored, info = Scored.from_pretrained(zoo / "fused", output_loading_info=True)
    assert info["missing_keys"] == {"score.weight", "score.bias"}
    scored.save_pretrained(tmp_path / "scored")
    again = Scored.from_pretrained(tmp_path / "scored")
    assert again.score.weight.equal(scored.score.weight)


@pytest.mark.parametrize("value", [[], "x", None])
def test_a_fused_folder_is_saved_again_whatever_it_says_of_its_code(value, zoo, tmp_path):
    given = copied(zoo, "fused", tmp_path)
    config(auto_map=value)(given)
    UltraFuserForCausalLM.from_pretrained(given).save_pretrained(tmp_path / "again")
    written = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "again", zoo / "fused")]
    assert written[0]["auto_map"] == written[1]["auto_map"]


@pytest.mark.parametrize("value", [False, None])
def test_a_configuration_that_asks_for_tuples_changes_nothing_but_the_type_of_outputs(value, zoo, tmp_path):
    given = copied(zoo, "fused", tmp_path)
    edited("config.json", lambda c: [part.update(return_dict=value) for part in (c, *c["specialists"])])(given)
    words = ("hello there", "--json")
    assert said(0, "explain", given, *words) == said(0, "explain", zoo / "fused", *words)
    model, expected = (UltraFuserForCausalLM.from_pretrained(folder) for folder in (given, zoo / "fused"))
    assert model(IDS)[0].equal(expected(IDS).logits)
    assert isinstance(model(IDS), tuple)
    assert model.specialist("code")(IDS).logits.equal(expected.specialist("code")(IDS).logits)


@pytest.mark.parametrize("value", [0.5, ["a"], [0, 1], True, "yes"])
def test_what_a_specialists_configuration_says_of_outputs_is_the_fused_models_choice(value, zoo, tmp_path):
    folder, ids = shutil.copytree(zoo / "fused", tmp_path / "fused"), torch.arange(5, 12)[None]
    config = json.loads((folder / "config.json").read_text())
    config["specialists"][0]["output_hidden_states"] = value
    (folder / "config.json").write_text(json.dumps(config))
    output, expected = (UltraFuserForCausalLM.from_pretrained(f)(ids) for f in (folder, zoo / "fused"))
    assert torch.equal(output.logits, expected.logits)
    assert output.hidden_states is None


def test_sizes_that_differ_on_purpose_are_the_users_choice(zoo):
    other = UltraFuserForCausalLM.from_pretrained(zoo / "fused").config
    other.vocab_size = 310
    model = UltraFuserForCausalLM.from_pretrained(zoo / "fused", config=other, ignore_mismatched_sizes=True)
    assert model.lm_head.weight.shape[0] == 310
    model = UltraFuserForCausalLM.from_pretrained(zoo / "fused")
    model.resize_token_embeddings(310)
    assert model.lm_head.weight.shape[0] == 310


def test_old_rotary_frequencies_in_a_file_are_passed_over(zoo, tmp_path):
    given = copied(zoo, "code", tmp_path)
    tensors(lambda s: s.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))(given)
    assert said(0, "fuse", f"text={zoo}/text", f"code={given}", "--out", tmp_path / "out")


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


# ---------------------------------------------------------------------------------- code that a tokenizer names


def name_code(folder):
    edited("tokenizer_config.json", lambda c: c.update(auto_map={"AutoTokenizer": ["evil/repo--x.T", None]}))(folder)


def tells_of_code(folder):
    return [p for p in folder.rglob("*.json") if "evil" in p.read_text()]


def test_a_fused_folder_names_no_code_of_a_specialists_tokenizer(zoo, tmp_path):
    given, out = copied(zoo, "text", tmp_path), tmp_path / "fused"
    name_code(given)
    said(0, "fuse", f"text={given}", f"code={zoo}/code", "--out", out)
    assert not tells_of_code(out)


@pytest.mark.parametrize("words", [("specialist", "code"), ("add", "more={zoo}/code")], ids=str)
def test_a_folder_made_of_a_fused_one_names_no_code_of_its_tokenizer(words, zoo, tmp_path):
    given, out = copied(zoo, "fused", tmp_path), tmp_path / "out"
    name_code(given)
    said(0, words[0], given, words[1].format(zoo=zoo), "--out", out)
    assert not tells_of_code(out)


def test_a_reference_keeps_no_tokenizer_that_names_code(refs, tmp_path):
    name_code(copied(tmp_path, "whole", tmp_path))
    assert "has an `auto_map`" in said(2, "refer", tmp_path / "given" / "whole", "--out", tmp_path / "more")
    settings = refs.with_name("tokenizer_config.json")
    settings.write_text('{"auto_map": {"AutoTokenizer": ["evil/repo--x.T", null]}}')
    changed(refs, lambda r: r.setdefault("sha256", {}).update({settings.name: sha256(settings)}))
    assert "has an `auto_map`" in said(2, "fuse", refs, "--out", tmp_path / "again")


# ---------------------------------------------------------------------------------- references


@pytest.fixture
def refs(zoo, tmp_path):
    """A reference to a model of specialists whose files are several."""
    for name in ("text", "code"):
        AutoModelForCausalLM.from_pretrained(zoo / name).save_pretrained(tmp_path / name, max_shard_size="20KB")
        AutoTokenizer.from_pretrained(zoo / name).save_pretrained(tmp_path / name)
    said(0, "fuse", f"text={tmp_path}/text", f"code={tmp_path}/code", "--out", tmp_path / "whole")
    said(0, "refer", tmp_path / "whole", "--out", tmp_path / "refs")
    return tmp_path / "refs" / "refs.yaml"


def changed(file, change, **options):
    found = yaml.safe_load(file.read_text())
    change(found)
    file.write_text(yaml.safe_dump(found, **options))


def test_the_order_of_a_references_keys_means_nothing(refs, tmp_path):
    assert list(yaml.safe_load(refs.read_text())["specialists"]) == ["text", "code"]
    changed(refs, lambda r: None, sort_keys=True)
    assert list(yaml.safe_load(refs.read_text())["specialists"]) == ["code", "text"]
    said(0, "fuse", refs, "--out", tmp_path / "again")
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_every_file_that_is_read_is_pinned(refs, tmp_path):
    pinned = yaml.safe_load(refs.read_text())["specialist_sha256"]["code"]
    shards = {p.name for p in (tmp_path / "code").glob("*.safetensors*")}
    assert len(shards) > 2
    assert {*shards, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= {*pinned}


REFERENCES = {
    "hashes of nothing": (
        lambda r: r.update(specialist_sha256={"text": {}, "code": {}}),
        "pins every file that is read",
    ),
    "no hashes": (lambda r: r.update(specialist_sha256={}), "pins the files of every specialist"),
    "a shard not pinned": (
        lambda r: r["specialist_sha256"]["code"].pop("model.safetensors.index.json"),
        "pins every file that is read",
    ),
    "the gate not pinned": (lambda r: r["sha256"].pop("gate.safetensors"), "pins every file that is read"),
    "the configuration not pinned": (lambda r: r["sha256"].pop("config.json"), "pins every file that is read"),
    "a file elsewhere": (
        lambda r: r["specialist_sha256"]["code"].update({"../../etc/passwd": "0" * 64}),
        "names '../../etc",
    ),
    "a device": (lambda r: r["sha256"].update({"/dev/zero": "0" * 64}), "names '/dev/zero'"),
    "specialists renamed": (
        lambda r: [r[k].update(maths=r[k].pop("code")) for k in ("specialists", "specialist_sha256")],
        "names the specialists of the configuration",
    ),
    "specialists as a list": (lambda r: r.update(specialists=["a", "b"]), "`name: word` for each"),
    "no specialists": (lambda r: r.pop("specialists"), "`name: word` for each"),
    "a template that is a list": (lambda r: r.update(chat_template=[1]), "is a name"),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_a_reference_that_leaves_something_open_is_refused(case, refs, tmp_path):
    change, words = REFERENCES[case]
    changed(refs, change, sort_keys=False)
    assert words in said(2, "fuse", refs, "--out", tmp_path / "again")


GATES = {
    "the head with it": (lambda g: g.update({"lm_head.weight": torch.zeros(304, 32)}), "have no place"),
    "a tensor missing": (lambda g: g.pop(next(iter(g))), "are missing"),
    "another shape": (lambda g: g.update({k: t[:1] for k, t in list(g.items())[:1]}), "has shape"),
    "another type": (lambda g: g.update({k: t.half() for k, t in g.items()}), "float16"),
}


@pytest.mark.parametrize("case", GATES)
def test_a_gates_file_holds_the_gate_and_nothing_else(case, refs, tmp_path):
    change, words = GATES[case]
    gate = load_file(refs.with_name("gate.safetensors"))
    change(gate)
    save_file(gate, refs.with_name("gate.safetensors"))
    from ultrafuser.build.references import sha256

    changed(refs, lambda r: r["sha256"].update({"gate.safetensors": sha256(refs.with_name("gate.safetensors"))}))
    assert words in said(2, "fuse", refs, "--out", tmp_path / "again")


# ---------------------------------------------------------------------------------- recipes


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + k)}: &{chr(98 + k)} [{','.join(['*' + chr(97 + k)] * 9)}]\n" for k in range(9)
)
YAML = {
    "cut off": "specialists: {a: b",
    "a bomb of aliases": BOMB,
    "a merge of an alias": "a: &a {x: 1}\nspecialists: {<<: *a}\n",
    "an alias of itself": "specialists: &a [*a]\n",
    "a key twice": "specialists: {a: x, a: y}\n",
    "a number for a key": "specialists: {1: x, 2: y}\n",
    "an object of Python's": "specialists: !!python/object/apply:os.system [ls]\n",
    "without bottom": "[" * 100_000,
    "many levels": "a: " + "{a: " * 100 + "1" + "}" * 100,
    "bytes": "\x00\x01",
    "a long number": "specialists: " + "9" * 5000,
}


@pytest.mark.parametrize("case", YAML)
@pytest.mark.parametrize("command", [("fuse",), ("train", "--stage", "gate"), ("data", "plan")], ids=lambda c: c[0])
def test_yaml_that_is_more_than_plain_values_is_refused_in_a_sentence(case, command, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(YAML[case])
    name, *rest = command
    found = said(2, name, *rest, file, *([] if name == "data" else ["--out", tmp_path / "out"]))
    assert "recipe.yaml" in found
    assert len(found) < 1000


@pytest.mark.parametrize("name", ["backbones", "rope_parameters", "shared", "specialist_names", "sub_configs"])
def test_a_name_that_is_the_configurations_own_is_refused(name, zoo, tmp_path):
    found = said(2, "fuse", f"text={zoo}/text", f"{name}={zoo}/code", "--out", tmp_path / "out")
    assert f"got '{name}'" in found


def test_the_card_of_a_specialist_may_say_anything(zoo, tmp_path):
    given = copied(zoo, "code", tmp_path)
    for card in ("---\nlicense: {a: [b\n---\n", f"---\n{BOMB}license: *j\n---\n", "---\n- 5\n---\n", "\x00"):
        (given / "README.md").write_text(card)
        assert "malformed" in said(0, "check", zoo / "text", given) or card == "\x00"


def test_slow_and_fast_tokenizers_of_one_kind_are_one(zoo):
    assert common_tokenizer({"text": zoo / "text", "code": zoo / "code"}).vocab_size == 300


# ---------------------------------------------------------------------------------- at random


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "base"
    fuzz.build(folder)
    return folder


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
    with pytest.raises(ValueError, match="`output_attentions` is true or false"):
        check_folder(tmp_path)
