"""Code that comes with a model, a tokenizer, a recipe or a task is not run unasked."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import CHAT_TEMPLATE
from tests.support.tiny import specialist, tokenizer
from ultrafuser.cli.app import app


ROOT = Path(__file__).parents[2]
EVIL = """
import os
with open({mark!r}, "a") as file:
    file.write("x")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilTok(PreTrainedTokenizerFast): pass
class EvilConfig(LlamaConfig): pass
class EvilModel(LlamaForCausalLM): pass
def generate(model, *args, **kwargs): pass
def evil(*args): return ""
"""


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "RAN"


@pytest.fixture
def fused(tmp_path, mark):
    """A fused folder whose tokenizer, model, generation and every module want to run code."""
    folder = tmp_path / "fused"
    model = UltraFuserForCausalLM.from_specialists({n: specialist(layers=1) for n in ("text", "code")})
    model.save_pretrained(folder)
    tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    spoil(folder, mark)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.EvilTok", "evil.EvilTok"]})
    for module in folder.glob("*_ultrafuser.py"):
        module.write_text(EVIL.format(mark=str(mark)) + module.read_text())
    return folder


@pytest.fixture
def other(tmp_path, mark):
    """A model of an architecture of its own."""
    folder = tmp_path / "other"
    specialist(layers=1).save_pretrained(folder)
    tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    spoil(folder, mark)
    maps = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    change(folder / "config.json", model_type="evil", auto_map=maps)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.EvilTok", "evil.EvilTok"]})
    change(folder / "tokenizer_config.json", tokenizer_class="EvilTok")
    return folder


def spoil(folder, mark):
    (folder / "custom_generate").mkdir()
    for file in ("evil.py", "custom_generate/generate.py"):
        (folder / file).write_text(EVIL.format(mark=str(mark)))


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    talk = [
        {"role": "user", "content": "Why is it so, please tell me now?"},
        {"role": "assistant", "content": "Because it is so, and it always was."},
    ]
    common = {"messages": talk, "domain": "text", "source": "s", "licence": "mit"}
    path.write_text("".join(json.dumps({**common, "topic": str(i)}) + "\n" for i in range(4)))
    return path


def say(*arguments, given="y\ny\ny\n"):
    # a question on the standard input would be answered with yes
    return CliRunner().invoke(app, list(map(str, arguments)), input=given)


def test_looking_at_and_cleaning_data_run_no_code_of_a_folder_unless_asked(other, rows, mark, tmp_path):
    look = ["data", "look", rows, "--tokenizer", other, "--out"]
    clean = ["data", "clean", rows, "--ifd-model", other, "--ifd-share", "0.5", "--processes", "1", "--out"]
    for number, command in enumerate((look, clean)):
        done = say(*command, tmp_path / f"out{number}")
        assert done.exit_code == 2
        assert "is not run unasked" in done.output
        assert not mark.exists()
    say(*look, tmp_path / "asked", "--trust-remote-code")
    assert mark.exists()


@pytest.mark.parametrize(
    "command",
    [
        ["explain", "FUSED", "hello there", "--generate", "2"],
        ["chat", "FUSED", "--max-new-tokens", "2"],
        ["specialist", "FUSED", "text", "--out", "OUT"],
        ["remove", "FUSED", "text", "--out", "OUT"],
        ["check", "FUSED", "OTHER"],
        ["fuse", "text=OTHER", "code=OTHER", "--out", "OUT"],
        ["add", "FUSED", "math=OTHER", "--out", "OUT"],
        ["speed", "FUSED", "--new-tokens", "8", "--assistant", "OTHER"],
        ["evaluate", "FUSED", "--data", "text=ROWS", "--also", "other=OTHER", "--out", "OUT"],
        ["evaluate", "FUSED", "--data", "text=ROWS", "--base", "OTHER", "--out", "OUT"],
        ["data", "look", "ROWS", "--tokenizer", "FUSED", "--out", "OUT"],
        ["train", "RECIPE"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_no_command_runs_code_of_a_folder(command, fused, other, rows, mark, tmp_path):
    recipe = {"stage": "gate", "model_name_or_path": str(fused), "trust_remote_code": True, "max_steps": 1}
    recipe |= {"domains": {"text": {"path": "json", "data_files": str(rows)}}, "output_dir": str(tmp_path / "out")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "examples_per_domain": 1, "report_to": "none"}))
    places = {
        "FUSED": fused,
        "OTHER": other,
        "ROWS": rows,
        "OUT": tmp_path / "out",
        "RECIPE": tmp_path / "recipe.yaml",
    }
    arguments = [word.replace(key, str(place)) for word in command for key, place in [_named(word, places)]]
    say(*arguments)
    assert not mark.exists()


def _named(word, places):
    return next(((key, place) for key, place in places.items() if key in word), ("\0", ""))


def test_benchmarks_run_no_code_of_a_folder_nor_of_tasks(fused, other, mark, tmp_path):
    pytest.importorskip("lm_eval")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text(json.dumps({"q": "1+1=", "a": "2"}) + "\n")
    task = {"task": "t", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tasks / "rows.jsonl")}}}
    task |= {"test_split": "test", "doc_to_text": "q", "doc_to_target": "a", "output_type": "generate_until"}
    task |= {"generation_kwargs": {"max_gen_toks": 1}, "metric_list": [{"metric": "exact_match"}]}
    plain = yaml.safe_dump(task)
    (tasks / "t.yaml").write_text(plain)
    bench = ["bench", fused, "t", "--include", tasks, "--limit", "1"]
    done = say(*bench, "--out", tmp_path / "plain")
    assert done.exit_code == 0, done.output
    assert "trust_remote_code=True" in json.loads((tmp_path / "plain" / "t.json").read_text())["command"]
    assert not mark.exists()
    assert say("bench", other, "t", "--include", tasks, "--out", tmp_path / "o").exit_code == 2
    (tasks / "evil.py").write_text(EVIL.format(mark=str(mark)))
    (tasks / "hidden.yaml").write_text("doc_to_text: !function evil.evil\n")
    (tmp_path / "outside.yaml").write_text("doc_to_text: !function tasks.evil.evil\n")
    for attack in (
        plain.replace("doc_to_text: q", "doc_to_text: !function evil.evil"),
        plain.replace("doc_to_text: q", "doc_to_text: !<!function> evil.evil"),
        "%TAG !f! !func\n---\n" + plain.replace("doc_to_text: q", "doc_to_text: !f!tion evil.evil"),
        plain + "include: hidden.yaml\n",
        plain + f"include: {tmp_path}/outside.yaml\n",
    ):
        (tasks / "t.yaml").write_text(attack)
        done = say(*bench, "--out", tmp_path / "attack")
        assert done.exit_code == 2, attack
        assert not mark.exists()
    for name in ("hidden.yaml", "evil.py"):
        (tasks / name).unlink()
    code = "{{ cycler.__init__.__globals__.os.system('touch " + str(mark) + "') }}"
    (tasks / "t.yaml").write_text(yaml.safe_dump({**task, "doc_to_text": code}))
    assert say(*bench, "--out", tmp_path / "template").exit_code != 0
    assert not mark.exists()


def test_a_training_recipe_sets_no_environment_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("STOLEN", raising=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"stage": "gate", "env": {"STOLEN": "1"}, "output_dir": str(tmp_path / "out")}))
    done = say("train", recipe)
    assert done.exit_code == 2
    assert "sets no environment variables" in done.output
    assert "STOLEN" not in os.environ


@pytest.mark.slow
def test_a_recipe_of_an_example_sets_no_environment_variable(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"stage": "gate", "env": {"STOLEN": "1"}, "output_dir": str(tmp_path / "out")}))
    script = [sys.executable, ROOT / "examples" / "train_gate.py", "--config", recipe]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "sets no environment variables" in done.stderr


def test_commands_load_through_the_one_loader():
    """Nothing in `ultrafuser` calls an auto class itself, nor trusts a folder."""
    wrong = []
    for path in sorted((ROOT / "ultrafuser").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "from_pretrained" and path.name != "pretrained.py":
                wrong += [(path.name, node.lineno)] if getattr(node.value, "id", "").startswith("Auto") else []
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                wrong += [(path.name, node.lineno)] if getattr(node.value, "value", None) is True else []
    assert not wrong
