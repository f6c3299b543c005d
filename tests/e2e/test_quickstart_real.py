"""The real quickstart on a small stand-in base: its table, its folder, and what it does when it is run again."""

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from modeling_ultrafuser.files_ultrafuser import read_json
from tests.support import small_real
from ultrafuser.cli.app import app
from ultrafuser.pretrained import open_fused
from ultrafuser.quickstart import real


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return small_real.make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def go(made):
    def go(out, **options):
        given = {"materials": small_real.materials(made), "schedule": small_real.SCHEDULE(), **options}
        return real.run(out, str(made / "base"), **given)

    return go


@pytest.fixture(scope="module")
def done(go, tmp_path_factory):
    """The folder of a whole run, and its losses."""
    out = tmp_path_factory.mktemp("done") / "out"
    return out, go(out)


def test_every_model_is_measured_on_every_domain(done):
    out, losses = done
    assert list(losses) == ["base", "math specialist", "code specialist", real.UNIFORM, real.FUSED]
    assert all(list(row) == list(small_real.DOMAINS) for row in losses.values())
    assert read_json(out / real.RESULTS)["nats_per_token"] == losses


def test_the_folder_is_a_fused_model_whose_gate_was_trained(done):
    out, _ = done
    model, tokenizer = open_fused(out / "fused")
    assert model.config.specialist_names == ["text", "math", "code"]
    assert model.config.use_cache
    ids = tokenizer("1+1?", return_tensors="pt").input_ids
    assert not model.gate_weights(ids).allclose(model.gate_weights(ids).new_tensor(1 / 3), atol=1e-5)
    assert AutoModelForCausalLM.from_pretrained(out / "fused", trust_remote_code=True).config.vocab_size == 99
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["fused"]


def test_run_again_it_says_the_same_and_makes_nothing_anew(done, go, capfd, monkeypatch):
    out, losses = done
    for name in ("_fit_gate", "_losses", "_answer"):
        monkeypatch.setattr(real, name, None)
    monkeypatch.setattr(real, "reload_elsewhere", lambda *arguments: [""])
    assert go(out) == losses
    said = capfd.readouterr().out
    assert "it says the same" in said
    assert f"ultrafuser chat {out / 'fused'}" in said.replace("\n", "")
    answer = read_json(out / real.ANSWERS)["Hello?"]
    assert "".join(piece for piece, _ in answer) in said


def test_another_seed_is_refused_in_the_same_folder(done, go):
    with pytest.raises(ValueError, match="was begun with {'seed': 0}.*--overwrite"):
        go(done[0], seed=1)


def test_a_folder_with_somebody_s_files_is_left_alone(go, tmp_path):
    (tmp_path / "fused").mkdir()
    with pytest.raises(FileExistsError, match="Nothing is overwritten unasked"):
        go(tmp_path)


def test_the_shipped_sets_are_small_and_share_no_question():
    gate, held_out = (real.by_domain(path) for path in (real.Materials().gate_rows, real.Materials().held_out_rows))
    assert list(gate) == list(held_out) == ["text", "math", "code", "both"]
    asked = [{row["prompt"][0]["content"] for rows in part.values() for row in rows} for part in (gate, held_out)]
    assert not asked[0] & asked[1]
    assert real.Materials().gate_rows.stat().st_size < 200_000


@pytest.mark.parametrize("given", [True, False])
def test_the_command_takes_the_folder_and_the_base(given, made, tmp_path, monkeypatch):
    monkeypatch.setattr(real, "run", lambda out, **options: print(out, options))
    base = ["--base", str(made / "base")] if given else []
    done = CliRunner().invoke(app, ["quickstart", "--real", *base])
    given = {"base": str(made / "base")} if given else {}
    assert done.output.split("ultrafuser-real", 1)[1].strip() == str({**given, "seed": 0, "overwrite": False})
