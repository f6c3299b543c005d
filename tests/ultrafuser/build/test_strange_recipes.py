"""References, recipes and tokenizers as a stranger may send them: read as plain values, or refused in a sentence."""

import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_ultrafuser import common_tokenizer
from tests.support.strange_folders import copied, edited, make_zoo, said
from ultrafuser.build.reference_file import sha256


@pytest.fixture(autouse=True)
def no_hang():
    """A pipe that is opened, or a name that is matched, may never end."""
    signal.alarm(120)
    yield
    signal.alarm(0)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return make_zoo(tmp_path_factory.mktemp("zoo"))


# ---------------------------------------------------------------------------------- code that a tokenizer names


def name_code(folder):
    edited("tokenizer_config.json", lambda c: c.update(auto_map={"AutoTokenizer": ["evil/repo--x.T", None]}))(folder)


def tells_of_code(folder):
    return [p for p in folder.rglob("*.json") if "evil" in p.read_text()]


@pytest.mark.e2e
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


@pytest.mark.e2e
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


@pytest.mark.e2e
def test_the_order_of_a_references_keys_means_nothing(refs, tmp_path):
    assert list(yaml.safe_load(refs.read_text())["specialists"]) == ["text", "code"]
    changed(refs, lambda r: None, sort_keys=True)
    assert list(yaml.safe_load(refs.read_text())["specialists"]) == ["code", "text"]
    said(0, "fuse", refs, "--out", tmp_path / "again")
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.e2e
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


@pytest.mark.e2e
@pytest.mark.grid
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


@pytest.mark.e2e
@pytest.mark.grid
@pytest.mark.parametrize("case", GATES)
def test_a_gates_file_holds_the_gate_and_nothing_else(case, refs, tmp_path):
    change, words = GATES[case]
    gate = load_file(refs.with_name("gate.safetensors"))
    change(gate)
    save_file(gate, refs.with_name("gate.safetensors"))
    from ultrafuser.build.reference_file import sha256

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


@pytest.mark.grid
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
