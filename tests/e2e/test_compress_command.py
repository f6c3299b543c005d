"""`ultrafuser compress` as a user runs it, and what comes of it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests.support.mixes import prompt
from tests.support.tuned import NAMES, make
from ultrafuser.cli.app import app


def run(*arguments):
    # wide enough for a whole table
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make(tmp_path_factory.mktemp("full"), rank=4, norms=True, tied=True)


@pytest.fixture
def pairs(sources):
    return [f"{name}={folder}" for name, folder in sources.items()]


@pytest.fixture
def data(sources, tmp_path):
    """Text that "code" has written, so that it is better at it than the base."""
    model = AutoModelForCausalLM.from_pretrained(sources["code"])
    torch.manual_seed(0)
    ids = model.generate(
        torch.randint(3, 99, (8, 4)), max_new_tokens=60, do_sample=True, eos_token_id=None, pad_token_id=0
    )
    file = tmp_path / "code.jsonl"
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()))
    return f"code={file}"


def base_of(sources):
    return sources["text"].removesuffix("text") + "base"


def test_one_alone_is_to_be_fused_with_the_base(sources, pairs, tmp_path):
    out = tmp_path / "small"
    done = run("compress", pairs[0], "--base", base_of(sources), "--rank", "4", "--out", out)
    assert done.exit_code == 0, done.output
    told = (
        " ".join(done.output.split())
        .partition("To fuse them: ultrafuser ")[2]
        .replace("FOLDER", str(tmp_path / "fused"))
    )
    fused = run(*told.split())
    assert fused.exit_code == 0, fused.output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "fused").config.specialist_names == [NAMES[0], "base"]


def test_it_writes_adapters_that_fuse_reads_and_says_what_they_keep(sources, pairs, data, tmp_path):
    out = tmp_path / "small"
    done = run("compress", *pairs, "--base", base_of(sources), "--rank", "4", "--out", out, "--data", data)
    assert done.exit_code == 0, done.output
    assert "Warning" not in done.output
    assert "tensors that LoRA does not hold (input_layernorm, norm, post_attention_layernorm)" in done.output
    assert "4 to 4" in done.output
    [row] = [line for line in done.output.splitlines() if "code" in line and "0.00 (0.00 to 0.00)" in line]
    assert 0.9 < float(row.split("%")[-2].split()[-1]) / 100 < 1.1
    fused = run("fuse", *(f"{name}={out / name}" for name in NAMES), "--out", tmp_path / "fused")
    assert fused.exit_code == 0, fused.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert model.config.format_version == 2
    assert model(prompt()).logits.isfinite().all()


def test_a_rank_that_loses_the_gain_is_warned_of_in_the_first_line(sources, pairs, data, tmp_path):
    out = tmp_path / "small"
    done = run(
        "compress", *pairs, "--base", base_of(sources), "--rank", "1", "--out", out, "--data", data, "--error", "0.1"
    )
    assert done.exit_code == 0, done.output
    lines = [line for line in done.output.splitlines() if "LoRA does not hold" not in line]
    assert lines[0].startswith("Warning: code lost ")
    assert "At rank 1 the error of 48 layers is above 0.1." in done.output


def test_what_cannot_be_is_refused_in_a_sentence(sources, pairs, tmp_path):
    done = run("compress", *pairs, "--base", base_of(sources), "--out", tmp_path / "small")
    assert done.exit_code == 2
    assert "Neither a rank nor an error is given." in done.output
    told = run(
        "compress", *pairs, "--base", base_of(sources), "--rank", "2", "--out", tmp_path, "--data", "art=x.jsonl"
    )
    assert "data for ['art']" in told.output
    assert "Traceback" not in done.output + told.output
