"""Specialists put in and taken out: the others' tensors stay, and what the gate says of them."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.gate_base_ultrafuser import Reads
from tests.support.tiny import GATE_WORDS, specialist, stir_gate, tokenizer
from ultrafuser.build.specialist_edits import add_specialist, remove_specialist
from ultrafuser.cli.app import app


IDS = torch.arange(3, 40)[None]


def fused_model(gate="mlp", *, last=32, temperature=1.0):
    """Specialists text, code and math; the last one's hidden size can differ."""
    models = {"text": specialist(), "code": specialist(layers=1), "math": specialist(layers=1, hidden_size=last)}
    model = UltraFuserForCausalLM.from_specialists(
        models, gate=gate, gate_temperature=temperature, gate_hidden_size=16
    )
    stir_gate(model)
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    tokenizer(chat_template="{{ messages }}").save_pretrained(folder)
    return folder


def run(*words):
    result = CliRunner().invoke(app, [str(w) for w in words])
    return result.exit_code, result.output


def assert_same_specialists(one, other, names):
    """Every tensor of the backbones, and every specialist's columns of the head, bit by bit."""
    for name in names:
        a, b = (model.specialist(name).state_dict() for model in (one, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.grid
@pytest.mark.parametrize("name", ["text", "code", "math"])
@pytest.mark.parametrize("gate", ["mlp", "constant", "uniform"])
def test_without_one_the_others_share_its_weight_in_proportion(gate, name):
    model = fused_model(gate)
    names = [n for n in ("text", "code", "math") if n != name]
    smaller = remove_specialist(model, name)
    assert smaller.config.specialist_names == names
    assert_same_specialists(model, smaller, names)
    old = model.gate_weights(IDS)[..., [model.config.specialist_names.index(n) for n in names]]
    torch.testing.assert_close(smaller.gate_weights(IDS), old / old.sum(-1, keepdim=True))


def test_without_one_an_mlp_gate_of_different_sizes_keeps_the_first_layers_of_the_others():
    model = fused_model(last=48)
    smaller = remove_specialist(model, "code")
    old = model.gate_weights(IDS)[..., [0, 2]]
    torch.testing.assert_close(smaller.gate_weights(IDS), old / old.sum(-1, keepdim=True))


def test_first_layers_that_became_of_one_size_but_differ_are_not_made_one():
    with pytest.raises(ValueError, match="have learned one each"):
        remove_specialist(fused_model(last=48), "math")


@pytest.mark.parametrize("gate", ["linear", "cross"])
def test_without_one_a_gate_of_all_states_keeps_what_it_read_from_the_others(gate):
    model = fused_model(gate)
    gate = model.model.fusion_gate
    with torch.no_grad():
        # what it reads from "code" tells no specialist from another then
        for weight in (gate.weight,) if hasattr(gate, "weight") else (gate.skip_weight, gate.hidden_weight):
            weight[:, 32:64] = weight[:1, 32:64] if weight is not getattr(gate, "hidden_weight", None) else 0
    old = model.gate_weights(IDS)[..., [0, 2]]
    torch.testing.assert_close(
        remove_specialist(model, "code").gate_weights(IDS), old / old.sum(-1, keepdim=True), rtol=1e-4, atol=1e-5
    )


def test_one_specialist_is_no_fused_model():
    model = UltraFuserForCausalLM.from_specialists({"text": specialist(), "code": specialist()})
    with pytest.raises(ValueError, match="ultrafuser specialist FOLDER code"):
        remove_specialist(model, "text")
    with pytest.raises(ValueError, match="no specialist 'cod'"):
        remove_specialist(model, "cod")


@pytest.mark.grid
@pytest.mark.parametrize("size", [32, 24])
@pytest.mark.parametrize("gate", [word for word, gate in GATE_WORDS.items() if Reads.PAST not in gate.reads])
def test_with_one_more_the_others_keep_their_proportions(gate, size, tmp_path):
    model, newcomer = fused_model(gate, temperature=2.0), specialist(layers=1, hidden_size=size)
    newcomer.save_pretrained(tmp_path)
    larger = add_specialist(model, "law", tmp_path)
    assert larger.config.specialist_names == ["text", "code", "math", "law"]
    assert_same_specialists(model, larger, ["text", "code", "math"])
    assert torch.equal(larger.specialist("law")(IDS).logits, newcomer(IDS).logits)
    new, old = larger.gate_weights(IDS), model.gate_weights(IDS)
    torch.testing.assert_close(new[..., :3], old * (1 - new[..., 3:]))
    if gate in ("constant", "uniform"):
        torch.testing.assert_close(new[..., 3], torch.full(IDS.shape, 0.25))


@pytest.mark.grid
@pytest.mark.parametrize("gate", GATE_WORDS)
def test_put_in_and_taken_out_again_leaves_every_tensor_as_it_was(gate, tmp_path):
    model = fused_model(gate)
    specialist(layers=1).save_pretrained(tmp_path)
    again = remove_specialist(add_specialist(model, "law", tmp_path), "law")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert again.config.to_dict() == model.config.to_dict()


def test_a_specialist_with_fewer_rows_is_refused_before_its_weights_are_read(tmp_path):
    specialist(vocab_size=90).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has only 90"):
        add_specialist(fused_model(), "law", tmp_path)


def test_a_specialist_with_another_tokenizer_is_refused_and_nothing_is_left(tmp_path):
    saved(fused_model(), tmp_path / "fused")
    specialist(layers=1).save_pretrained(tmp_path / "law")
    tokenizer(swap="ab").save_pretrained(tmp_path / "law")
    code, said = run("add", tmp_path / "fused", f"law={tmp_path / 'law'}", "--out", tmp_path / "new")
    assert code == 2
    assert "different tokenizer from 'text'" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fused", "law"]


READ = """
import json, sys
for name in ("modeling_ultrafuser", "trainers", "ultrafuser"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
weights = model.gate_weights(torch.arange(3, 40)[None])
print(json.dumps([sorted(key for key, found in info.items() if found), weights.tolist()]))
"""


@pytest.mark.slow
def test_commands_write_folders_that_load_elsewhere_and_say_what_is_in_them(tmp_path):
    model = fused_model()
    fused, law = saved(model, tmp_path / "fused"), tmp_path / "law"
    (fused / "specialists.json").write_text(json.dumps({"code": {"source": "owner/code", "commit": "abc"}}))
    newcomer = specialist(layers=1)
    saved(newcomer, law)
    assert run("add", fused, f"law={law}", "--out", tmp_path / "larger")[0] == 0
    assert run("remove", tmp_path / "larger", "code", "--out", tmp_path / "smaller")[0] == 0
    sources = [json.loads((tmp_path / n / "specialists.json").read_text()) for n in ("larger", "smaller")]
    assert [list(s) for s in sources] == [["code", "law"], ["law"]]
    assert sources[0]["law"]["source"] == str(law)

    done = subprocess.run([sys.executable, "-c", READ, tmp_path / "smaller"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    problems, weights = json.loads(done.stdout.splitlines()[-1])
    assert problems == []
    new = torch.tensor(weights)
    old = model.gate_weights(IDS)[..., [0, 2]]
    torch.testing.assert_close(new[..., :2] / new[..., :2].sum(-1, keepdim=True), old / old.sum(-1, keepdim=True))

    assert run("specialist", tmp_path / "smaller", "law", "--out", tmp_path / "again")[0] == 0
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(IDS).logits, newcomer(IDS).logits)
    assert not list((tmp_path / "again").glob("*.py"))
    assert AutoTokenizer.from_pretrained(tmp_path / "again").decode(IDS[0]) == tokenizer().decode(IDS[0])


@pytest.mark.grid
@pytest.mark.parametrize("words", [("specialist", "law"), ("remove", "law"), ("add", "law")])
def test_words_that_do_not_fit_are_refused_with_exit_code_2(words, tmp_path):
    saved(fused_model(), tmp_path / "fused")
    code, _ = run(words[0], tmp_path / "fused", words[1], "--out", tmp_path / "new")
    assert code == 2
    assert not (tmp_path / "new").exists()
