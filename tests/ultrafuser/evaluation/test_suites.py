"""Benchmarks by name: they exist, wrong ones are refused early, and what is finished is not run again."""

import json
import socket
from pathlib import Path

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner


lm_eval = pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager  # noqa: E402

from tests.support.tiny import tokenizer  # noqa: E402
from ultrafuser.cli.app import app  # noqa: E402
from ultrafuser.evaluation import suites  # noqa: E402
from ultrafuser.evaluation.suites import MMLU_GROUPS, SUITES, mmlu_means, run_suite  # noqa: E402


SUMS = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a, b in ((1, 2), (3, 4), (2, 2), (5, 3))]


# where in lm-eval the suites' tasks are; its whole index takes many seconds to build
FOLDERS = (
    "agieval",
    "gsm8k",
    "hendrycks_math",
    "minerva_math",
    "humaneval",
    "ifeval",
    "mbpp",
    "mmlu",
    "okapi",
    "truthfulqa",
)


@pytest.fixture(scope="module")
def manager():
    own = Path(lm_eval.__file__).parent / "tasks"
    return TaskManager(include_path=[own / folder for folder in FOLDERS], include_defaults=False)


@pytest.fixture
def lm_evals_own(manager, monkeypatch):
    monkeypatch.setattr(suites, "_task_manager", lambda tasks, include: manager)


@pytest.fixture
def folder(fused, tmp_path):
    fused.save_pretrained(tmp_path / "fused")
    tokenizer().save_pretrained(tmp_path / "fused")
    return tmp_path / "fused"


@pytest.fixture
def include(tmp_path):
    """Two tasks over the same questions: one lets the model write, one shows it two answers."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "sums.jsonl").write_text("\n".join(json.dumps(row) for row in SUMS))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tasks / "sums.jsonl")}}}
    common |= {"test_split": "test", "doc_to_text": "question", "doc_to_target": "answer", "metadata": {"version": 7}}
    written = {"output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]}
    written |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 2}}
    chosen = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{[answer, '?']}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tasks / "written.yaml").write_text(yaml.safe_dump({"task": "written", **common, **written}))
    (tasks / "chosen.yaml").write_text(yaml.safe_dump({"task": "chosen", **common, **chosen}))
    return tasks


def test_every_task_of_every_suite_is_one_of_lm_evals(manager):
    names = {task for name, suite in SUITES.items() if name != "local" for task in suite.tasks}
    assert not names - {*manager.all_subtasks, *manager.all_groups}


def test_every_subject_of_mmlu_is_in_exactly_one_group(manager):
    ours = [f"mmlu_{subject}" for subjects in MMLU_GROUPS.values() for subject in subjects]
    assert sorted(ours) == sorted(suites._leaves("mmlu", manager))
    assert {group: len(subjects) for group, subjects in MMLU_GROUPS.items()} == {
        "math": 5,
        "medicine": 9,
        "others": 43,
    }


def test_the_groups_of_mmlu_are_those_of_mixture_of_skills():
    # appendix B of the paper; MMLU-Medical has college and high-school biology in place of human aging and sexuality
    assert MMLU_GROUPS["math"] == [
        *("abstract_algebra", "college_mathematics", "elementary_mathematics"),
        *("high_school_mathematics", "high_school_statistics"),
    ]
    assert MMLU_GROUPS["medicine"] == [
        *("anatomy", "clinical_knowledge", "college_medicine", "human_aging", "human_sexuality"),
        *("medical_genetics", "nutrition", "professional_medicine", "virology"),
    ]


def test_an_unknown_name_is_answered_with_those_close_to_it(lm_evals_own, tmp_path):
    with pytest.raises(ValueError, match="'gsm8' is neither. Close to it are .*'gsm8k'"):
        run_suite("no/such/model", ["paper", "gsm8"], tmp_path / "out", run_code=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "task"), [("paper", "humaneval"), ("mbpp", "mbpp")])
def test_code_is_not_run_unasked_and_this_is_said_before_the_model_is_loaded(name, task, lm_evals_own, tmp_path):
    with pytest.raises(ValueError, match=rf"only when asked for, but \['{task}'\] do so. Set `--run-code`"):
        run_suite("no/such/model", [name], tmp_path)


def test_a_group_runs_code_if_one_of_its_tasks_does(include, tmp_path):
    (include / "written.yaml").write_text((include / "written.yaml").read_text() + "unsafe_code: true\n")
    (include / "group.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["chosen", "written"]}))
    with pytest.raises(ValueError, match=r"\['both'\] do so"):
        run_suite("no/such/model", ["chosen", "both"], tmp_path, include=include)


def test_local_tasks_must_be_written_first(lm_evals_own, tmp_path):
    with pytest.raises(ValueError, match="made from the corpora first"):
        run_suite("no/such/model", ["local"], tmp_path)


def test_a_server_that_does_not_answer_is_told_before_anything_is_written(include, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(OSError, match="refused"):
            run_suite("no/such/model", ["chosen"], tmp_path / "out", include=include, server=address)
    assert not (tmp_path / "out").exists()


@pytest.mark.e2e
def test_a_result_says_what_was_scored_and_how(folder, include, tmp_path):
    out = tmp_path / "out"
    results = run_suite(folder, ["chosen", "written"], out, include=include, limit=3, dtype="float32")
    assert sorted(file.name for file in out.glob("*.json")) == ["chosen.json", "written.json"]
    assert {task: json.loads((out / f"{task}.json").read_text()) for task in results} == results
    chosen = results["chosen"]
    accuracy = chosen["scores"]["chosen"]["acc,none"]
    right = 3 * accuracy["value"]
    assert right == round(right)
    # of a proportion in three draws
    share = accuracy["value"]
    assert accuracy["stderr"] == pytest.approx((share * (1 - share) / 2) ** 0.5)
    assert (chosen["samples"], chosen["versions"]["tasks"]) == ({"chosen": 3}, {"chosen": 7})
    assert chosen["settings"]["limit"] == 3
    assert (
        f"lm_eval --model hf --model_args pretrained={folder},trust_remote_code=True,dtype=float32"
        in chosen["command"]
    )
    assert chosen["command"].endswith(f"--limit 3 --include_path {include}")


@pytest.mark.e2e
def test_a_run_that_failed_goes_on_where_it_was(folder, include, tmp_path, monkeypatch):
    out = tmp_path / "out"
    broken = (include / "written.yaml").read_text()
    (include / "written.yaml").write_text(broken.replace("doc_to_text: question", "doc_to_text: '{{question / 2}}'"))
    with pytest.raises(ValueError, match="'written' cannot be run by lm-eval: RenderingError: unsupported operand"):
        run_suite(folder, ["chosen", "written"], out, include=include)
    (include / "written.yaml").write_text(broken)
    before = (out / "chosen.json").stat().st_mtime_ns
    evaluate, asked = suites.simple_evaluate, []
    monkeypatch.setattr(suites, "simple_evaluate", lambda *a, **k: asked.append(k["tasks"]) or evaluate(*a, **k))
    results = run_suite(folder, ["chosen", "written"], out, include=include)
    assert asked == [["written"]]
    assert list(results) == ["chosen", "written"]
    assert (out / "chosen.json").stat().st_mtime_ns == before


@pytest.mark.e2e
def test_results_of_other_settings_are_not_taken_for_these(folder, include, tmp_path):
    run_suite(folder, ["chosen"], tmp_path / "out", include=include, limit=3)
    with pytest.raises(ValueError, match=r"has \(there, now\) {'limit': \(3, 4\)}"):
        run_suite(folder, ["chosen"], tmp_path / "out", include=include, limit=4)


def test_the_mean_of_a_group_is_the_plain_mean_of_its_subjects():
    names = [f"mmlu_{subject}" for subject in MMLU_GROUPS["math"]]
    results = {n: {"scores": {n: {"acc,none": {"value": i / 10, "stderr": 0.0}}}} for i, n in enumerate(names)}
    assert mmlu_means(results) == {"math": pytest.approx(0.2)}


def test_mmlu_and_mt_bench_are_summarised_as_mixture_of_skills_does(tmp_path):
    names = [f"mmlu_{subject}" for subjects in MMLU_GROUPS.values() for subject in subjects]
    results = {n: {"scores": {n: {"acc,none": {"value": 0.25 if "math" in n else 0.5, "stderr": 0.0}}}} for n in names}
    of_math = sum("math" in n for n in names)
    mean = (0.25 * of_math + 0.5 * (57 - of_math)) / 57
    assert mmlu_means(results)["all"] == pytest.approx(mean)
    file = tmp_path / "results.json"
    judged = {
        "method": "grading",
        "questions": "mt_bench",
        "judge": "x",
        "score": 6.5,
        "interval": None,
        "unjudged": 0,
    }
    file.write_text(json.dumps(judged))
    grade = suites.read_mt_bench(file, ["mmlu_math", "mmlu_medicine", "mmlu_others", "gsm8k"])
    assert suites.skills_mean(results, grade) == pytest.approx((100 * mean + 65) / 2)
    with pytest.raises(ValueError, match=r"\['mmlu_medicine', 'mmlu_others'\] are not among the suites"):
        suites.read_mt_bench(file, ["mmlu_math"])
    file.write_text(json.dumps(judged | {"score": None}))
    with pytest.raises(ValueError, match="holds no mean grade"):
        suites.read_mt_bench(file, ["mmlu_math", "mmlu_medicine", "mmlu_others"])


def test_few_shot_suites_have_shots_by_task():
    shots = SUITES["skills_math"].by_task()
    assert (shots["gsm8k"], shots["hendrycks_math"], shots["mmlu_abstract_algebra"]) == (5, 5, 0)
    assert len(shots) == 2 + 5
    assert set(SUITES["math_cot"].by_task().values()) == {None}


def test_the_command_line_says_what_is_wrong_in_a_sentence(lm_evals_own, tmp_path):
    done = CliRunner().invoke(app, ["bench", "no/such/model", "gsm8", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "'gsm8' is neither" in done.output


def test_the_command_line_names_every_suite():
    (argument,) = (p for p in get_command(app).commands["bench"].params if p.name == "tasks")
    assert all(suite in argument.help for suite in SUITES)


@pytest.mark.e2e
def test_the_command_line_prints_a_line_for_each_score(folder, include, tmp_path):
    command = ["bench", str(folder), "chosen", "--include", str(include), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    value = json.loads((tmp_path / "out" / "chosen.json").read_text())["scores"]["chosen"]["acc,none"]["value"]
    assert f"{value:.4f}" in done.stdout
    assert "chosen" in done.stdout


@pytest.mark.e2e
def test_a_second_model_is_shown_beside_the_first_and_a_missing_one_is_told_before(folder, include, tmp_path):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    command = ["bench", str(folder), "chosen", "--include", str(include), "--out"]
    told = CliRunner().invoke(app, [*command, second, "--against", f"first={first}"])
    assert told.exit_code == 2
    assert "has no result of ['chosen']" in " ".join(told.output.split())
    assert not (tmp_path / "second").exists()
    assert CliRunner().invoke(app, [*command, first]).exit_code == 0
    kept = json.loads((tmp_path / "first" / "chosen.json").read_text())
    right = kept["scores"]["chosen"]["acc,none"]["value"]
    assert sum(kept["answers"]) == right * len(SUMS)
    assert kept["seconds"] > 0
    (tmp_path / "first" / "chosen.json").write_text(json.dumps(kept | {"answers": [1 - a for a in kept["answers"]]}))
    done = CliRunner().invoke(app, [*command, second, "--against", f"first={first}"], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    (row,) = [line for line in done.stdout.splitlines() if "chosen" in line and "%" in line]
    # what was right there is wrong here, and the reverse
    assert f"{1 - right:.1%}" in row
    assert f"{right:.1%}" in row


HOSTILE = {
    "an error": ({"doc_to_text": "{{ question / 2 }}"}, "unsupported operand"),
    "no template": ({"doc_to_text": "{% for %}"}, "RenderingError"),
    "what is not there": ({"doc_to_text": "{{ nothing.at.all }}"}, "'nothing' is undefined"),
    "Python's inside": ({"doc_to_text": "{{ ''.__class__.__mro__ }}"}, "is unsafe"),
    "memory": ({"doc_to_text": "{{ 'a' * 10 ** 10 }}"}, "memory"),
    "recursion": ({"doc_to_text": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"}, "RenderingError"),
    "a length": ({"doc_to_text": "{{ 'a' * 20000000 }}"}, "20,000,000 characters"),
    "no list of choices": ({"doc_to_choice": "{{ '[[[' }}"}, "'t' cannot be run"),
    "brackets": ({"doc_to_choice": "{{ '[' * 100000 }}"}, "'t' cannot be run"),
    "a metric": ({"metric_list": [{"metric": "nothing"}]}, "cannot be run"),
    "a kind": ({"output_type": "telepathy"}, "cannot be run"),
    "no set": ({"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}, "cannot be run"),
    "a split": ({"test_split": ["test"]}, "cannot be run"),
    "itself": ({"task": ["t"], "group": "t"}, "'t' holds itself"),
}


@pytest.mark.grid
@pytest.mark.parametrize("fault", HOSTILE)
def test_what_is_wrong_with_a_task_of_somebody_elses_is_one_sentence(fault, folder, include, tmp_path):
    changes, words = HOSTILE[fault]
    whole = yaml.safe_load((include / "chosen.yaml").read_text())
    (include / "t.yaml").write_text(yaml.safe_dump({**whole, "task": "t", **changes}))
    command = ["bench", str(folder), "t", "--include", str(include), "--out", str(tmp_path / "out"), "--limit", "2"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit), done.exception
    assert words in " ".join(done.output.split())
    assert not list((tmp_path / "out").glob("*.json"))


@pytest.mark.e2e
def test_a_template_without_end_is_given_up(folder, include, tmp_path, monkeypatch):
    monkeypatch.setattr("trainers.template_sandbox.SECONDS", 1.0)
    whole = yaml.safe_load((include / "chosen.yaml").read_text())
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (include / "t.yaml").write_text(yaml.safe_dump({**whole, "task": "t", "doc_to_text": loops}))
    with pytest.raises(ValueError, match="'t' cannot be run by lm-eval: RenderingError: it took longer than 1 s"):
        run_suite(folder, ["t"], tmp_path / "out", include=include, limit=2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [x, x]\nb: [*a, *a]\n", "alias"),
        ("[" * 100_000, "cannot be read"),
        ("task: t\ntask: u\n", "twice"),
        ("x" * 2_000_000, "has at most"),
        ("\x00", "cannot be read"),
    ],
)
def test_a_file_of_tasks_that_is_no_plain_yaml_is_named(text, words, include, tmp_path):
    (include / "t.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"t.yaml.*{words}|{words}.*t.yaml"):
        run_suite("no/such/model", ["t"], tmp_path / "out", include=include)


@pytest.mark.parametrize(
    "settings",
    [
        {"filter_list": [{"name": "x", "filter": [{"function": "regex", "regex_pattern": "(.*.*)*=$"}]}]},
        {"metric_list": [{"metric": "exact_match", "regexes_to_ignore": ["(.*.*)*=$"]}]},
    ],
)
def test_patterns_of_strangers_are_not_matched_unasked(settings, include, tmp_path):
    written = yaml.safe_load((include / "written.yaml").read_text())
    (include / "written.yaml").write_text(yaml.safe_dump({**written, **settings}))
    with pytest.raises(ValueError, match="written.yaml.*trust-remote-code"):
        run_suite("no/such/model", ["written"], tmp_path / "out", include=include)


@pytest.mark.e2e
def test_templates_of_strangers_are_filled_in_as_lm_eval_does(folder, include, tmp_path, monkeypatch):
    text = "{{ question | regex_replace('1', 'one') }}\n{% if answer == '3' %}three{% endif %}\n"
    written = yaml.safe_load((include / "written.yaml").read_text())
    (include / "written.yaml").write_text(yaml.safe_dump({**written, "doc_to_text": text}))
    prompts = []
    evaluate = suites.simple_evaluate

    def watched(*args, **options):
        evaluated = evaluate(*args, **options)
        prompts.append([row["arguments"][0][0] for row in evaluated["samples"]["written"]])
        return evaluated

    monkeypatch.setattr(suites, "simple_evaluate", watched)
    for trusted in (False, True):
        out = tmp_path / f"out-{trusted}"
        run_suite(folder, ["written"], out, include=include, limit=2, trust_remote_code=trusted)
    assert prompts == [["one+2=\nthree\n", "3+4=\n\n"]] * 2


def test_names_of_tasks_lead_to_files_of_their_own_in_the_folder():
    names = [
        "mmlu_math",
        "a",
        "A",
        "../evil",
        "..",
        "/tmp/evil",
        "a/b",
        "a\\b",
        "a_b",
        ".hidden",
        "x" * 300,
        "x" * 299,
        "",
        "*",
    ]
    files = suites.file_names(names)
    assert list(files) == names
    assert (files["mmlu_math"], files["a"], files["a_b"]) == ("mmlu_math.json", "a.json", "a_b.json")
    # on disks that do not tell cases apart, too
    assert len({file.lower() for file in files.values()}) == len(names)
    for file in files.values():
        assert Path(file).name == file
        assert file.endswith(".json")
        assert not file.startswith(".")
        assert len(file) < 120


@pytest.mark.e2e
def test_a_task_whose_name_is_a_path_is_written_into_the_folder(folder, include, tmp_path):
    whole = yaml.safe_load((include / "chosen.yaml").read_text())
    (include / "t.yaml").write_text(yaml.safe_dump({**whole, "task": "../../evil"}))
    out = tmp_path / "some" / "where" / "out"
    results = run_suite(folder, ["../../evil"], out, include=include, limit=2)
    (file,) = out.glob("*.json")
    assert json.loads(file.read_text()) == results["../../evil"]
    assert not list(tmp_path.rglob("evil.json"))
    assert run_suite(folder, ["../../evil"], out, include=include, limit=2) == results
