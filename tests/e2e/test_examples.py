"""The examples, as their users start them, on stand-ins with the published models' vocabularies and layout."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import typer.main
import yaml
from rich.filesize import decimal
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests.support.conversations import CHAT_TEMPLATE, conversations
from tests.support.stage_run import free_port
from tests.support.stand_ins import QWEN_1_5B, QWEN_7B, SMALL, llama_2_trio, qwen_trio, qwen_words
from tests.support.tiny import tokenizer
from ultrafuser.check.checks import judge
from ultrafuser.cli.app import app
from ultrafuser.evaluation import contenders
from ultrafuser.evaluation.measurement import cost


EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = EXAMPLES / "recipes"
STAGE = {"max_steps": 2, "examples_per_domain": 2, "per_device_train_batch_size": 2, "bf16": False, "use_cpu": True}


# ---------------------------------------------------------------------------------- scripts of commands

# hands a command to this process, which has its libraries imported
SHIM = """#!/bin/sh
printf '%s\\0' "$(basename "$0")" "$@" > "$ASK/asked.part"
mv "$ASK/asked.part" "$ASK/asked"
until [ -e "$ASK/done" ]; do sleep 0.02; done
rm "$ASK/done"
"""


def run_script(name, *arguments, cwd, **variables):
    """Runs a script of `examples/` with bash. Returns the commands that it gave."""
    ask = cwd / "ask"
    ask.mkdir()
    for command in ("ultrafuser", "lm_eval"):
        (ask / command).write_text(SHIM)
        (ask / command).chmod(0o755)
    environment = {**os.environ, "PATH": f"{ask}:{os.environ['PATH']}", "ASK": str(ask), **variables}
    given = []
    script = subprocess.Popen(["bash", EXAMPLES / name, *map(str, arguments)], cwd=cwd, env=environment)
    try:
        while script.poll() is None:
            if (ask / "asked").exists():
                given.append((ask / "asked").read_text().split("\0")[:-1])
                (ask / "asked").unlink()
                do(given[-1], cwd)
                (ask / "done").touch()
            time.sleep(0.01)
    finally:
        script.kill()
    assert script.returncode == 0, given[-1]
    return given


def do(words, cwd):
    """Runs a command in this process and fails the test if it fails. What would not end is read only."""
    program, *arguments = words
    with mock.patch.dict(os.environ), mock.patch.object(sys, "argv", words):
        before = os.getcwd()
        os.chdir(cwd)
        try:
            if program == "lm_eval":
                runpy.run_module("lm_eval", run_name="__main__")
            elif arguments[0] == "serve":
                command = typer.main.get_command(app).commands["serve"]
                command.make_context("serve", arguments[1:])
                assert Path(arguments[1], "config.json").exists()
            else:
                done = CliRunner().invoke(app, arguments)
                assert done.exit_code == 0, (words, done.output[-3000:], done.exception)
        finally:
            os.chdir(before)


@pytest.fixture
def conversing(tmp_path, monkeypatch):
    """One file of conversations for each domain, to train on and to judge by."""
    monkeypatch.setattr(contenders, "cost", partial(cost, new_tokens=2, repeats=1))
    (tmp_path / "held-out").mkdir()
    for name in ("text", "code", "math", "medicine"):
        for folder in (tmp_path, tmp_path / "held-out"):
            (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(c) for c in conversations(6)))
    return tmp_path


def tensors(folder):
    return load_file(folder / "model.safetensors")


def small_qwen(folder, rows=2048):
    """Three that can be run; with as many rows as the published ones, or fewer, to be done sooner."""
    words = qwen_words() if rows == QWEN_1_5B["vocab_size"] else qwen_words(rows - 48)
    return qwen_trio(folder, QWEN_1_5B, words, weights=True, **SMALL, vocab_size=rows)


def fuse(folders, out):
    words = [f"{folder.name}={folder}" for folder in folders]
    done = CliRunner().invoke(app, ["fuse", *words, "--chat-template", "text", "--out", str(out)])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("rows", [2048, pytest.param(151936, marks=pytest.mark.slow)])
def test_the_qwen_script_goes_from_the_check_to_a_trained_gate(rows, conversing):
    places = {folder.name.upper(): str(folder) for folder in small_qwen(conversing / "models", rows)}
    given = run_script("qwen2.5.sh", cwd=conversing, OUT="out", STEPS="1", EXAMPLES="2", **places)
    assert [words[1] for words in given] == ["check", "fuse", "fuse", "train", "evaluate", "explain", "serve"]
    gate, fused = tensors(conversing / "out/gate"), tensors(conversing / "out/fused")
    assert fused["lm_head.weight"].shape == (rows, 3 * 8)
    moved = {key for key in gate if not torch.equal(gate[key], fused[key])}
    assert moved
    assert all(key.startswith("model.fusion_gate.") for key in moved)
    assert (conversing / "out/evaluated/results.json").exists()


def test_the_qwen_script_says_what_check_says(tmp_path):
    said = (EXAMPLES / "qwen2.5.sh").read_text()
    recipe = (RECIPES / "joint_lora.yaml").read_text()
    words = qwen_words(2000)  # of the vocabulary only the number of rows counts here
    for size, shape in {"1.5B": QWEN_1_5B, "7B": QWEN_7B}.items():
        folders = qwen_trio(tmp_path / size, shape, words)
        numbers = judge({folder.name: (str(folder), None) for folder in folders}).numbers
        column = ["1.5B", "7B"].index(size)
        training = numbers["training"]
        for what, number in {
            "disk, and memory in bfloat16": numbers["disk"],
            "cache of a token": numbers["cache_per_token"],
            "to train the gate": training["gate"],
            "stage two: everything in float32": training["joint"],
            "stage two: LoRA": training["joint with LoRA"],
        }.items():
            line = next(line for line in said.splitlines() if what in line)
            assert line.partition(what)[2].split("B")[column].strip() + "B" == decimal(number), line
        assert f"{decimal(training['joint with LoRA'])} at {size}" in recipe
        shutil.rmtree(tmp_path / size)


def test_a_fourth_specialist_joins_and_the_others_stay(conversing):
    *three, medicine = *small_qwen(conversing / "models"), *small_qwen(conversing / "others")[:1]
    fuse(three, conversing / "three")
    given = run_script(
        "add_a_specialist.sh", "three", f"medicine={medicine}", "four", cwd=conversing, STEPS="1", EXAMPLES="2"
    )
    assert [words[1] for words in given] == ["add", "train"]
    three, four = tensors(conversing / "three"), tensors(conversing / "four/gate")
    assert all(torch.equal(four[key], tensor) for key, tensor in three.items() if ".specialists." in key)
    assert torch.equal(four["lm_head.weight"][:, :24], three["lm_head.weight"])
    names = AutoModelForCausalLM.from_pretrained(conversing / "four/gate", trust_remote_code=True).config
    assert names.specialist_names == ["text", "code", "math", "medicine"]


SUMS = [{"question": f"{a}+{b}=", "choices": [str(a + b), str(a), "?"]} for a, b in ((1, 2), (3, 4), (2, 2))]


# each run of lm-eval reads all of its own tasks first
@pytest.mark.slow
def test_lm_eval_scores_a_fused_model_and_its_specialists(conversing):
    pytest.importorskip("lm_eval")
    fuse(small_qwen(conversing / "models"), conversing / "fused")
    (conversing / "sums.jsonl").write_text("\n".join(map(json.dumps, SUMS)))
    task = {
        **{"task": "sums", "output_type": "multiple_choice", "test_split": "test", "dataset_path": "json"},
        **{"doc_to_text": "{{question}}", "doc_to_target": 0, "doc_to_choice": "{{choices}}"},
        "dataset_kwargs": {"data_files": {"test": str(conversing / "sums.jsonl")}},
    }
    (conversing / "tasks").mkdir()
    (conversing / "tasks/sums.yaml").write_text(yaml.safe_dump(task))
    words = ("--tasks", "sums", "--include_path", "tasks", "--device", "cpu", "--batch_size", "2")
    given = run_script("evaluate_with_lm_eval.sh", "fused", "scores", *words, cwd=conversing, SPECIALISTS="math")
    assert [words[0] for words in given] == ["lm_eval", "ultrafuser", "lm_eval"]
    for name in ("fused", "math"):
        (scores,) = (conversing / "scores" / name).rglob("results_*.json")
        assert 0 <= json.loads(scores.read_text())["results"]["sums"]["acc,none"] <= 1


@pytest.mark.slow
@pytest.mark.skipif("VLLM_VENV" not in os.environ, reason="VLLM_VENV names no environment that has vLLM")
def test_vllm_answers(tmp_path):
    from tests.vllm.cases import SERVED, save_fused
    from tests.vllm.check_vllm import surroundings

    save_fused(tmp_path / "fused", SERVED["three depths, one tied"])
    # the command of vLLM's CPU build does not start
    command = tmp_path / "vllm"
    python = Path(os.environ["VLLM_VENV"]).absolute() / "bin/python"
    command.write_text(f'#!/bin/sh\nshift\nexec {python} -P -m vllm.entrypoints.openai.api_server --model "$@"\n')
    command.chmod(0o755)
    variables = {"VLLM": str(command), "PORT": str(free_port()), "no_proxy": "localhost"}
    done = subprocess.run(
        ["bash", EXAMPLES / "serve_with_vllm.sh", tmp_path / "fused", "--dtype", "float32"],
        **{"env": {**surroundings(tmp_path), **variables}, "cwd": tmp_path, "stdout": subprocess.PIPE, "text": True},
    )
    assert done.returncode == 0
    # the server's last words stand behind the answer
    answer, _ = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index('{"id"') :])
    assert answer["choices"][0]["message"]["content"]


# ---------------------------------------------------------------------------------- scripts in Python, and recipes


def write_recipe(path, base, **changed):
    """A recipe of `examples/`, with models and data of ours and few steps."""
    recipe = yaml.safe_load((RECIPES / base).read_text())
    data = {name: {"path": "json", "data_files": str(path.parent / f"{name}.jsonl")} for name in recipe["domains"]}
    small = {**STAGE, "domains": data, "report_to": "none", "save_strategy": "no", "dtype": "float32"}
    path.write_text(yaml.safe_dump({**recipe, **small, **changed}))
    return str(path)


def run_python(script, *arguments):
    with mock.patch.object(sys, "argv", [script, *map(str, arguments)]):
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def test_the_papers_three_read_the_prompt_in_their_own_templates(conversing):
    folders = llama_2_trio(conversing / "models", weights=True, **SMALL)
    specialists = {folder.name: str(folder) for folder in folders}
    gate, joint = conversing / "gate", conversing / "joint"
    recipe = conversing / "recipe.yaml"
    run_python("llama2.py", write_recipe(recipe, "paper_gate.yaml", specialists=specialists, output_dir=str(gate)))
    assert tensors(gate)["lm_head.weight"].shape == (32000, 3 * 8)
    trained = {"model_name_or_path": str(gate), "output_dir": str(joint)}
    run_python("llama2.py", write_recipe(recipe, "paper_joint.yaml", **trained))
    one, two = tensors(gate), tensors(joint)
    assert not torch.equal(one["lm_head.weight"], two["lm_head.weight"])


def test_lora_trains_adapters_and_merges_them_into_one_folder(conversing):
    fused, out = conversing / "fused", conversing / "adapters"
    fuse(small_qwen(conversing / "models"), fused)
    changed = {"model_name_or_path": str(fused), "output_dir": str(out)}
    run_python("lora_stage_two.py", write_recipe(conversing / "recipe.yaml", "joint_lora.yaml", **changed))
    before, merged = tensors(fused), tensors(out / "merged")
    assert set(merged) == set(before)
    moved = {key for key in merged if not torch.equal(merged[key], before[key])}
    assert any("fusion_gate" in key for key in moved)
    assert any("q_proj" in key for key in moved)
    assert "lm_head.weight" not in moved
    assert {"tokenizer.json", "chat_template.jinja", "modeling_ultrafuser.py"} <= {
        p.name for p in (out / "merged").iterdir()
    }


@pytest.fixture
def recipe(specialists, tmp_path):
    """A recipe with local specialists and one file of conversations per domain."""
    for name, model in specialists.items():
        model.save_pretrained(tmp_path / name)
        tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(tmp_path / name)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(c) for c in conversations(6)))
    domains = {n: {"path": "json", "data_files": str(tmp_path / f"{n}.jsonl")} for n in specialists}
    return {"domains": domains, "dtype": "float32", "report_to": "none", "save_strategy": "no", **STAGE}


@pytest.mark.slow
def test_both_stages_run_from_recipes_one_after_the_other_and_torchrun_starts_them(recipe, specialists, tmp_path):
    gate, joint, path = tmp_path / "gate", tmp_path / "joint", tmp_path / "recipe.yaml"
    fuse = {"specialists": {n: str(tmp_path / n) for n in specialists}, "output_dir": str(gate)}
    learned = {"mix_reward": "regret", "mix_every": 1, "mix_delay": 1}
    path.write_text(yaml.safe_dump({**recipe, **fuse, **learned}))
    run_python("train_gate.py", "--config", path, "--learning_rate", "0.01")
    trained = {"model_name_or_path": str(gate), "trust_remote_code": True, "output_dir": str(joint)}
    of_two = {"per_device_train_batch_size": 1, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2}
    path.write_text(yaml.safe_dump({**recipe, **trained, **of_two}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command = [*torchrun, str(free_port()), str(EXAMPLES / "train_joint.py"), "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=550)
    assert done.returncode == 0, done.stderr[-6000:]
    state = json.loads((joint / "checkpoint-2" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]] == [1, 2]
    one, two = (AutoModelForCausalLM.from_pretrained(f, trust_remote_code=True) for f in (gate, joint))
    ids = torch.arange(3, 9)[None]
    for name, model in specialists.items():
        assert torch.equal(one.specialist(name)(ids).logits, model(ids).logits)
        assert not torch.equal(two.specialist(name)(ids).logits, model(ids).logits)


# those that make data are for another command
TRAINING = sorted(p for p in RECIPES.glob("*.yaml") if "stage:" in p.read_text())


@pytest.mark.parametrize("path", TRAINING, ids=lambda p: p.stem)
def test_every_field_of_every_recipe_is_one_that_its_script_reads(path):
    from trl import ModelConfig

    from ultrafuser.train.stage_recipe import STAGES, FusedArguments

    recipe = yaml.safe_load(path.read_text())
    known = {f for cls in (STAGES[recipe["stage"]], ModelConfig, FusedArguments) for f in cls.__dataclass_fields__}
    assert set(recipe) <= known
    batch = recipe["examples_per_domain"] * len(recipe["domains"])
    assert batch % recipe["per_device_train_batch_size"] == 0


def test_every_example_is_listed():
    listed = (EXAMPLES / "README.md").read_text()
    files = [p for p in EXAMPLES.rglob("*") if p.is_file() and "__pycache__" not in p.parts and p.name != "README.md"]
    assert not [p.name for p in files if p.relative_to(EXAMPLES).as_posix() not in listed]
