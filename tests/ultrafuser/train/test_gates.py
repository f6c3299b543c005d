"""Which gate: all on one cache, measured on rows that none has seen, the best one saved."""

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import CHAT_TEMPLATE, PAPER, conversations
from tests.support.fusions import MIXTURES
from tests.support.tiny import specialist, tokenizer
from trainers import CachedGateTrainer
from ultrafuser.cli.app import app
from ultrafuser.strategies import CANDIDATES, DEFAULT_GATE


NAMES = ["text", "code"]
SMALL = {"examples_per_domain": 2, "per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True}
SMALL |= PAPER


@pytest.fixture
def words(tmp_path):
    model = UltraFuserForCausalLM.from_specialists({name: specialist(layers=1) for name in NAMES})
    model.save_pretrained(tmp_path / "fused")
    tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(tmp_path / "fused")
    given = ["--model", tmp_path / "fused", "--max-steps", 2, "--learning_rate", 0.01]
    for name in NAMES:
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(c) for c in conversations(12)))
        given += ["--data", f"{name}={tmp_path / name}.jsonl"]
    return [*given, *(word for key, value in SMALL.items() for word in (f"--{key}", value))]


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def passes(monkeypatch):
    """How often a batch of rows is read by the specialists to be kept."""
    seen, plain = [], CachedGateTrainer._said_of
    monkeypatch.setattr(CachedGateTrainer, "_said_of", lambda self, rows: seen.append(rows) or plain(self, rows))
    return seen


@pytest.mark.e2e
def test_gates_share_a_cache_and_the_best_one_is_saved(words, tmp_path, monkeypatch):
    seen, out = passes(monkeypatch), tmp_path / "gated"
    done = run("gates", *words, "--gate", "mlp:8", "--gate", "linear", "--seeds", 2, "--out", out)
    assert done.exit_code == 0, done.output
    rows = [line.split("│") for line in done.output.splitlines() if line.startswith("│")]
    gates = [(row[1].strip(), row[2].strip()) for row in rows]
    assert sorted(gates) == sorted([("uniform", "0"), *((g, s) for g in ("mlp:8", "linear") for s in "01")])
    means = [float(row[-2]) for row in rows]
    assert means == sorted(means)
    # 11 rows of each domain are trained on, two at a time, by one pass
    assert [len(batch) for batch in seen] == [2] * 11
    saved = UltraFuserForCausalLM.from_pretrained(out)
    assert saved.config.gate == gates[0][0].partition(":")[0]
    # the specialists are untouched
    before, after = (load_file(f / "model.safetensors") for f in (tmp_path / "fused", out))
    assert all(torch.equal(after[key], t) for key, t in before.items() if "fusion_gate" not in key)
    assert (out / "tokenizer.json").exists()


@pytest.mark.e2e
def test_without_a_word_the_default_is_compared_with_a_linear_and_the_papers_gate(words, tmp_path, monkeypatch):
    seen = passes(monkeypatch)
    done = run("gates", *words, "--out", tmp_path / "gated")
    assert done.exit_code == 0, done.output
    rows = {line.split("│")[1].strip() for line in done.output.splitlines() if line.startswith("│")}
    assert rows == {"uniform", *CANDIDATES}
    assert CANDIDATES[0] == DEFAULT_GATE
    # temperatures are learned from whole logits, and one pass serves all
    assert len(seen) == 11


@pytest.mark.e2e
def test_gates_that_look_back_share_the_cache_with_others_and_one_without_parameters_is_measured_once(
    words, tmp_path, monkeypatch
):
    seen, gates = passes(monkeypatch), ["--gate", "linear", "--gate", "posterior", "--gate", "evidence:8"]
    done = run("gates", *words, *gates, "--seeds", 2, "--out", tmp_path / "gated")
    assert done.exit_code == 0, done.output
    rows = [line.split("│") for line in done.output.splitlines() if line.startswith("│")]
    found = sorted((row[1].strip(), row[2].strip()) for row in rows)
    once = [("posterior", "0"), ("uniform", "0")]
    assert found == sorted([*once, *((g, s) for g in ("evidence:8", "linear") for s in "01")])
    assert len(seen) == 11


@pytest.mark.e2e
@pytest.mark.parametrize("fusion", MIXTURES)
def test_gates_that_predict_temperatures_share_the_cache_with_those_that_do_not(fusion, words, tmp_path, monkeypatch):
    fused = UltraFuserForCausalLM.from_pretrained(tmp_path / "fused")
    models = {name: fused.specialist(name) for name in fused.config.specialist_names}
    UltraFuserForCausalLM.from_specialists(models, fusion=fusion).save_pretrained(tmp_path / "fused")
    seen, gates = passes(monkeypatch), ["--gate", "linear", "--gate", "cross:8+calibration"]
    done = run("gates", *words, *gates, "--out", tmp_path / "gated")
    assert done.exit_code == 0, done.output
    assert len(seen) == 11
    rows = {line.split("│")[1].strip() for line in done.output.splitlines() if line.startswith("│")}
    assert rows == {"uniform", "linear", "cross:8+calibration"}


@pytest.mark.e2e
def test_more_gates_read_the_same_cache(words, tmp_path, monkeypatch):
    cache = ["--cache", tmp_path / "said"]
    assert run("gates", *words, *cache, "--gate", "constant", "--out", tmp_path / "one").exit_code == 0
    seen = passes(monkeypatch)
    assert run("gates", *words, *cache, "--gate", "linear", "--out", tmp_path / "two").exit_code == 0
    assert not seen


def test_what_cannot_be_compared_is_refused_before_anything_is_loaded(words, tmp_path):
    odd = ("mpl", "linear:4", "mlp:wide", "mlp:0", "mlp:", "mlp:²", "mlp:٣", "mlp+calibration", "linear+more")
    for gate in (*odd, "cross:99999999999+calibration", "evidence:65537"):
        done = run("gates", *words, "--gate", gate, "--out", tmp_path / "gated")
        assert done.exit_code == 2
        assert f"But got '{gate}'" in done.output
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps(c) for c in conversations(3)))
    done = run("gates", *words, "--gate", "linear", "--out", tmp_path / "gated")
    assert "'text' has only 3 rows. Give it at least 6." in done.output
    assert not (tmp_path / "gated").exists()


# ---------------------------------------------------------------------------------------------- train --cached


@pytest.mark.e2e
def test_stage_one_is_trained_from_a_cache_as_without(words, tmp_path, monkeypatch):
    seen = passes(monkeypatch)
    for name, more in {"plain": [], "cached": ["--cached"]}.items():
        done = run("train", "--stage", "gate", *words, "--out", tmp_path / name, *more)
        assert done.exit_code == 0, done.output
    assert len(seen) == 12
    plain, cached = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "cached"))
    for key, tensor in plain.items():
        torch.testing.assert_close(cached[key], tensor, rtol=1e-4, atol=1e-6)
    assert (tmp_path / "cached" / "cache" / "states.bin").exists()


def test_what_moves_is_not_kept(words, tmp_path):
    done = run("train", "--stage", "joint", *words, "--out", tmp_path / "joint", "--cached")
    assert done.exit_code == 2
    assert "while they do not move" in done.output
