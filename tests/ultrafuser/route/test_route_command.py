"""`ultrafuser route`: from data to a folder with which a chat is routed."""

import json

import pytest
from typer.testing import CliRunner

from tests.support.greedy import decoded
from tests.support.tiny import tokenizer
from ultrafuser.cli.app import app


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def run(*words, **settings):
    return CliRunner().invoke(app, list(map(str, words)), **settings)


def said_by(model, line, tokens=30):
    """What a specialist says after a line, with a begin of its own that no other one would write."""
    ids = tokenizer()(line, return_tensors="pt")["input_ids"]
    return line + decoded(model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :])


@pytest.mark.e2e
def test_a_router_is_trained_and_its_choice_answers_alone(fused, tmp_path):
    fused.generation_config.suppress_tokens = [0, 1, 2]
    fused.save_pretrained(tmp_path / "fused")
    tokenizer().save_pretrained(tmp_path / "fused")
    code, math = fused.specialist("code"), fused.specialist("math")
    data = {
        "programs": write(tmp_path / "code.jsonl", [said_by(code, f"def f{i}(self): ") for i in range(6)]),
        "sums": write(tmp_path / "math.jsonl", [said_by(math, f"what is {i} + {i}? ") for i in range(6)]),
    }
    domains = [word for name, file in data.items() for word in ("--data", f"{name}={file}")]
    options = ("--prompt-tokens", 12, "--kind", "table", "--out", tmp_path / "router")
    done = run("route", tmp_path / "fused", *domains, *options)
    assert done.exit_code == 0, done.output
    assert "chooses the best specialist for 100% of the prompts that it learned from" in done.output
    asked = ["chat", tmp_path / "fused", "--router", tmp_path / "router", "--alone", "--max-new-tokens", 12]
    for line, specialist in (("def f9(self):", code), ("what is 9 + 9?", math)):
        done = run(*asked, input=f"{line}\n")
        assert done.exit_code == 0, done.output
        assert done.stdout.splitlines()[-1] == said_by(specialist, line, 12)[len(line) :]


def test_a_router_that_needs_no_training_or_a_folder_in_use_is_told_before_anything_is_loaded(tmp_path):
    data = ("--data", f"a={write(tmp_path / 'a.jsonl', ['x'])}", "--out", tmp_path / "out")
    done = run("route", tmp_path / "none", *data, "--kind", "perplexity")
    assert done.exit_code == 2
    assert "no such router: 'perplexity'" in done.output
