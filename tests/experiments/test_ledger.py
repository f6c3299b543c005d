import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

from experiments import ledger
from experiments.__main__ import main
from experiments.run_processes import check


CONFIG = {
    "runner": "toy",
    "seeds": [0, 1],
    "shared": {"rate": 0.1, "stage": {"steps": 3, "mix": "balanced"}},
    "variants": {"one, plain": None, "two": {"stage": {"mix": "learned"}}},
}


@pytest.fixture
def root(tmp_path):
    """A tree with one experiment, whose runner is never imported."""
    (tmp_path / "experiments" / "tried").mkdir(parents=True)
    (tmp_path / "experiments" / "toy.py").touch()
    write(tmp_path, CONFIG)
    return tmp_path


def write(root, config):
    (root / "experiments" / "tried" / "config.yaml").write_text(yaml.safe_dump(config))


def missing(root):
    return [str(run) for run in ledger.read("tried", root) if ledger.result(run, root) is None]


def test_a_variants_own_settings_come_before_the_shared_ones_in_nested_settings_too(root):
    plain, *_, two = (run.settings for run in ledger.read("tried", root))
    assert plain == CONFIG["shared"]
    assert two == {"rate": 0.1, "stage": {"steps": 3, "mix": "learned"}}


def test_what_has_a_result_is_not_missing_and_what_has_none_is(root):
    assert len(missing(root)) == 4
    ledger.record(ledger.read("tried", root)[0], {"loss": 1.0}, root)
    assert missing(root) == ["tried: one, plain, seed 1", "tried: two, seed 0", "tried: two, seed 1"]
    with pytest.raises(ValueError, match="tried: one, plain, seed 1, has no result"):
        ledger.results("tried", root)


def test_a_changed_config_makes_the_results_missing_that_it_touches_and_no_others(root):
    for run in ledger.read("tried", root):
        ledger.record(run, {"loss": 1.0}, root)
    assert missing(root) == []
    write(root, CONFIG | {"variants": {**CONFIG["variants"], "two": {"stage": {"mix": "other"}}}})
    assert missing(root) == ["tried: two, seed 0", "tried: two, seed 1"]
    write(root, CONFIG | {"shared": CONFIG["shared"] | {"rate": 0.2}})
    assert len(missing(root)) == 4


def test_the_order_of_settings_changes_no_hash():
    assert ledger.digest({"a": 1, "b": {"c": 2, "d": 3}}) == ledger.digest({"b": {"d": 3, "c": 2}, "a": 1})
    assert ledger.digest({"a": 1}) != ledger.digest({"a": 2})


def test_a_result_says_where_it_comes_from(root):
    run = ledger.read("tried", root)[0]
    found = json.loads(ledger.record(run, {"loss": 1.0}, root).read_text())
    assert (found["name"], found["seed"], found["config"], found["loss"]) == ("one, plain", 0, run.digest(), 1.0)
    assert found["commit"].rstrip("+")
    assert {"torch", "python"} <= set(found["versions"])
    assert found["machine"]["cores"] == os.cpu_count()


def test_a_run_killed_while_it_writes_leaves_the_result_that_was_there(root, monkeypatch):
    run = ledger.read("tried", root)[0]
    ledger.record(run, {"loss": 1.0}, root)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        ledger.record(run, {"loss": 2.0}, root)
    assert ledger.result(run, root)["loss"] == 1.0


TOY = """
def run(seed, work, *, rate, stage):
    if stage["mix"] == "learned" and not (work / "repaired").exists():
        raise RuntimeError("broken")
    return {"loss": rate * (seed + 1)}

RUNS = {"tried": run}
"""


@pytest.mark.e2e
def test_a_failed_experiment_keeps_what_it_has_and_goes_on_from_there(root):
    for name in ("ledger.py", "run_processes.py", "__main__.py"):
        shutil.copy(ledger.ROOT / "experiments" / name, root / "experiments")
    (root / "experiments" / "toy.py").write_text(TOY)
    command = [sys.executable, "-m", "experiments", "--work", str(root / "work")]

    first = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert first.returncode != 0
    assert "broken" in first.stderr
    assert missing(root) == ["tried: two, seed 0", "tried: two, seed 1"]

    (root / "work" / "repaired").touch()
    kept = ledger.read("tried", root)[0].path(root).stat().st_mtime_ns
    second = subprocess.run([*command, "--jobs", "2"], cwd=root, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "2/2 tried: two" in second.stdout
    assert [[r["loss"] for r in found] for found in ledger.results("tried", root).values()] == [[0.1, 0.2], [0.1, 0.2]]
    assert ledger.read("tried", root)[0].path(root).stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"variant": {}}, "must have"),
        ({"runner": "nobody"}, "names runner 'nobody'"),
        ({"variants": {"a b": {}, "a_b": {}}}, "would write the same file"),
        ({"variants": {"a": 3}}, "settings by name, but 'a' is 3"),
    ],
)
def test_a_config_that_is_none_is_refused_in_words(root, change, said):
    write(root, CONFIG | change)
    with pytest.raises(ValueError, match=said):
        ledger.read("tried", root)


def test_a_config_that_is_not_yaml_is_refused_in_words(root):
    (root / "experiments" / "tried" / "config.yaml").write_text("seeds: [0")
    with pytest.raises(ValueError, match="is not YAML"):
        ledger.read("tried", root)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gates": {"max_steps": 3}}, "unexpected keyword argument 'gates'"),
        ({"gate": {"max_step": 3}}, "unexpected keyword argument 'max_step'"),
        ({"joint": {"mix_policy": "fair"}}, "must be one of"),
        ({"shares": {"text": 1.0}}, "`shares` must say how much there is of each"),
    ],
)
def test_settings_that_a_run_does_not_take_are_refused_before_anything_runs(settings, said):
    run = ledger.read("stages")[0]
    with pytest.raises(ValueError, match=said) as error:
        check(run._replace(settings=run.settings | settings))
    assert str(error.value).startswith("stages: joint from the start, seed 0: ")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"joint": {"after": ["fused, no gate"], "stage": {}}}, "all of `joint: after:`, but has"),
        (
            {"gates": {"fused": {"gate": "mpl", "fusion": "logits"}}, "joint": {"after": ["fused"], "stage": {}}},
            "A gate is one of",
        ),
        (
            {"gates": {"fused": {"gate": "mlp", "fusion": "logit"}}, "joint": {"after": ["fused"], "stage": {}}},
            "`fusion` is one of",
        ),
        (
            {
                "gates": {"fused": {"gate": "mlp", "fusion": "logits", "stage": {"step": 1}}},
                "joint": {"after": ["fused"], "stage": {}},
            },
            "'step'",
        ),
    ],
)
def test_gates_that_there_are_not_are_refused_before_anything_runs(settings, said):
    run = ledger.read("baselines")[0]
    with pytest.raises(ValueError, match=said):
        check(run._replace(settings=run.settings | settings))


def test_an_experiment_that_the_runner_does_not_know_is_refused_before_anything_runs():
    with pytest.raises(
        ValueError, match=r"riddles: experiments/stage_runs.py runs \['mixes', 'rates', 'stages'\] only"
    ):
        check(ledger.read("stages")[0]._replace(experiment="riddles"))


@pytest.mark.parametrize("experiment", ledger.experiments())
def test_every_run_of_every_config_is_one_that_its_runner_takes(experiment):
    for run in ledger.read(experiment):
        check(run)


@pytest.mark.parametrize("experiment", ledger.experiments())
def test_no_result_file_is_without_a_run_that_would_make_it(experiment):
    runs = ledger.read(experiment)
    assert {p.name for p in runs[0].path().parent.glob("*.json")} <= {run.path().name for run in runs}


def test_list_says_that_nothing_is_missing_of_what_the_documents_show(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments", "--list", "stages", "mixes", "rates"])
    main()
    assert capsys.readouterr().out.splitlines()[-1] == "0 of 62 runs are missing"


def test_list_and_help_do_not_wait_for_torch():
    said = "import sys, runpy; sys.argv = ['x', '--list']; runpy.run_module('experiments', run_name='__main__'); "
    done = subprocess.run([sys.executable, "-c", said + "assert 'torch' not in sys.modules"], cwd=ledger.ROOT)
    assert done.returncode == 0


def test_a_name_that_is_no_experiment_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments", "stagse"])
    with pytest.raises(SystemExit):
        main()
    assert "There is no experiment 'stagse', only " in capsys.readouterr().err
