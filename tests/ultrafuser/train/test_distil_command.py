"""One model from a fused one on the command line: what is written, going on, and what is refused before models are loaded."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import CHAT_TEMPLATE, conversations
from tests.support.tiny import specialist, stir_gate, tokenizer
from ultrafuser.cli.app import app


NAMES = ["text", "code"]
SMALL = {"examples_per_domain": 2, "per_device_train_batch_size": 2, "report_to": "none", "max_completion_length": 4}


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    root = tmp_path_factory.mktemp("distil")
    torch.manual_seed(0)
    model = UltraFuserForCausalLM.from_specialists({name: specialist(layers=1) for name in NAMES}, gate="mlp")
    stir_gate(model)
    model.save_pretrained(root / "fused")
    tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(root / "fused")
    (root / "fused" / "specialists.json").write_text(
        json.dumps({"code": {"source": "o/code", "commit": "abc", "licence": "mit"}})
    )
    for name in NAMES:
        (root / f"{name}.jsonl").write_text("\n".join(json.dumps(c) for c in conversations(6)))
    return root / "fused"


def run(fused, out, *words, student="text", names=NAMES):
    data = [word for name in names for word in ("--data", f"{name}={fused.parent / name}.jsonl")]
    small = [word for key, value in SMALL.items() for word in (f"--{key}", value)]
    given = ["--model", fused, "--out", out, *([] if student is None else ["--student", student])]
    return CliRunner().invoke(app, [*map(str, ["distil", *given, *data, *small, "--max-steps", 2, *words])])


@pytest.mark.e2e
def test_a_student_is_a_stock_folder_with_a_card_and_a_run_goes_on(fused, tmp_path):
    out = tmp_path / "small"
    done = run(fused, out, "--save_steps", 1)
    assert done.exit_code == 0, done.output
    assert not list(out.glob("*.py"))
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["use_cache"], config.get("auto_map")) == ("llama", True, None)
    student = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
    words = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    assert words.chat_template == CHAT_TEMPLATE
    first = UltraFuserForCausalLM.from_pretrained(fused).specialist("text")
    moved = student.get_input_embeddings().weight - first.get_input_embeddings().weight
    assert 0 < moved.abs().max() < 0.1
    card = (out / "README.md").read_text()
    assert "code (o/code, mit)" in card
    assert "2 steps of 2 examples of each of code, text" in card
    assert "answers: written by the student" in card

    again = run(fused, out, "--save_steps", 1)
    assert again.exit_code == 2
    assert "ultrafuser distil --resume" in again.output
    weights = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").unlink()
    done = run(fused, out, "--save_steps", 1, "--resume")
    assert done.exit_code == 0, done.output
    assert "Going on from" in done.output
    assert (out / "model.safetensors").read_bytes() == weights


@pytest.mark.e2e
def test_a_recipe_teaches_a_model_of_another_shape(fused, tmp_path):
    specialist("llama", layers=3, hidden_size=16).save_pretrained(tmp_path / "start")
    tokenizer().save_pretrained(tmp_path / "start")
    data = {n: {"path": "json", "data_files": str(fused.parent / f"{n}.jsonl")} for n in NAMES}
    written = {"model_name_or_path": str(fused), "student": str(tmp_path / "start"), "off_policy": True, **SMALL}
    written |= {"output_dir": str(tmp_path / "small"), "domains": data, "max_steps": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(written))
    done = CliRunner().invoke(app, ["distil", str(tmp_path / "recipe.yaml")])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "small" / "config.json").read_text())["hidden_size"] == 16
    assert "answers: given" in (tmp_path / "small" / "README.md").read_text()


@pytest.mark.e2e
def test_a_student_as_a_gguf_file_predicts_the_same(fused, tmp_path):
    pytest.importorskip("gguf")
    from tests.support.gguf_files import write

    assert run(fused, tmp_path / "small").exit_code == 0
    student, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "small"), torch.arange(3, 40)[None]
    write(tmp_path / "small.gguf", student)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf")
    torch.testing.assert_close(read(ids).logits, student(ids).logits, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_distilled_is_refused_before_models_are_loaded(fused, tmp_path, monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(UltraFuserForCausalLM, "from_pretrained", load)
    specialist(layers=1).save_pretrained(tmp_path / "other")
    tokenizer(swap=("a", "b")).save_pretrained(tmp_path / "other")
    refused = {
        "`student` is not given": run(fused, tmp_path / "out", student=None),
        "the student": run(fused, tmp_path / "out", student=tmp_path / "other"),
        "There is no student './tekst': neither a specialist of ['text',": run(
            fused, tmp_path / "out", student="./tekst"
        ),
        "This is for a fused model": run(tmp_path / "other", tmp_path / "out"),
        "has none. Add `domains:`": run(fused, tmp_path / "out", names=[]),
        "'--off_polcy'": run(fused, tmp_path / "out", "--off_polcy", "true"),
    }
    for fault, done in refused.items():
        assert done.exit_code == 2, done.output
        assert fault in done.output, done.output
    assert not (tmp_path / "out" / "config.json").exists()
