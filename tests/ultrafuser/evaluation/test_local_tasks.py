"""The local benchmarks ask what no model was trained on, and can be answered."""

import functools
import json

import pytest


lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.model import LM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from ultrafuser.evaluation import local_tasks  # noqa: E402
from ultrafuser.quickstart.corpora import DOMAINS, documents, splits  # noqa: E402


FINISHED = {
    "is": " None:",
    "==": " 'abc'",
    "+": " ''",
    "[": "0]",
    ".": "upper()",
    "'": "'",
    "not": " 1",
    "len(": "'abc')",
}


class Taught(LM):
    """Writes what it was taught for a prompt; prefers the ways to go on that it was taught to all others."""

    def __init__(self, answers, preferred):
        super().__init__()
        self.answers, self.preferred = answers, preferred

    def generate_until(self, requests, disable_tqdm=False):
        return [self.answers[request.args[0]] for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        return [(float(request.args in self.preferred), False) for request in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError


@pytest.fixture(scope="module", autouse=True)
def _corpora_once():
    # they take seconds to make
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_tasks, "documents", functools.cache(documents))
        yield


@pytest.fixture(scope="module")
def parts(_corpora_once):
    return {domain: splits(local_tasks.documents(domain, 0)) for domain in DOMAINS}


@pytest.fixture(scope="module")
def folder(_corpora_once, tmp_path_factory):
    folder = tmp_path_factory.mktemp("local tasks")  # with a space
    local_tasks.write(folder)
    return folder


@pytest.fixture(scope="module")
def items(folder):
    return {f.stem: [json.loads(line) for line in f.read_text().splitlines()] for f in folder.glob("*.jsonl")}


def score(folder, answers, preferred):
    results = lm_eval.simple_evaluate(
        Taught(answers, preferred),
        tasks=list(local_tasks.NAMES),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        confirm_run_unsafe_code=True,
        limit=40,
    )
    metrics = ("exact_match,number", "runs,none", "acc,none", "acc_mutual_info,none")
    return {task: next(row[m] for m in metrics if m in row) for task, row in results["results"].items()}


@pytest.mark.slow
def test_who_knows_every_answer_gets_every_point(folder, items):
    answers = {i["prompt"]: f" {i['answer']}\n" for name in ("arithmetic", "algebra") for i in items[name]}
    answers |= {
        i["prompt"]: next(x for end, x in FINISHED.items() if i["prompt"].endswith(end)) for i in items["code"]
    }
    chosen = [i for name in ("prose", "two_domains") for i in items[name]]
    preferred = {(i["prompt"], i["choices"][i["answer"]]) for i in chosen}
    assert score(folder, answers, preferred) == dict.fromkeys(local_tasks.NAMES, 1)


@pytest.mark.e2e
def test_who_answers_wrongly_gets_none(folder, items):
    answers = {i["prompt"]: f" {i['answer']}1" for name in ("arithmetic", "algebra") for i in items[name]}
    answers |= {i["prompt"]: " )(" for i in items["code"]}
    chosen = [i for name in ("prose", "two_domains") for i in items[name]]
    preferred = {(i["prompt"], i["choices"][i["answer"] - 1]) for i in chosen}
    assert score(folder, answers, preferred) == dict.fromkeys(local_tasks.NAMES, 0)


@pytest.mark.e2e
def test_the_same_seed_writes_the_same_items(folder, tmp_path):
    local_tasks.write(tmp_path)
    for file in folder.glob("*.jsonl"):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


@pytest.mark.e2e
def test_each_task_has_items_enough_to_tell_models_apart(items):
    assert {f"ultrafuser_{name}" for name in items} == set(local_tasks.NAMES)
    assert min(len(rows) for rows in items.values()) > 90


@pytest.mark.e2e
@pytest.mark.parametrize("task", ["arithmetic", "algebra"])
def test_a_number_is_the_next_one_of_a_problem_that_was_not_trained_on(task, items, parts):
    problems = "\n\n".join(parts["math"]["held_out"])
    trained_on = {line for part in ("specialist", "fuse") for text in parts["math"][part] for line in text.split("\n")}
    for item in items[task]:
        assert f"{item['prompt']} {item['answer']}" in problems
        assert item["prompt"].split("\n")[0] not in trained_on


@pytest.mark.e2e
def test_a_cloze_goes_on_as_a_held_out_document_does_and_its_distractors_do_not(items, parts):
    held_out = "\n\n".join(parts["text"]["held_out"])
    trained_on = "\n\n".join(parts["text"]["specialist"] + parts["text"]["fuse"])
    for item in items["prose"]:
        whole = [item["prompt"] + choice for choice in item["choices"]]
        assert [text in held_out for text in whole] == [i == item["answer"] for i in range(4)]
        assert whole[item["answer"]] not in trained_on


@pytest.mark.e2e
def test_the_choices_for_two_domains_are_the_same_words_in_another_order(items):
    assert {item["domains"] for item in items["two_domains"]} == {"text and code", "text and math", "code and math"}
    for item in items["two_domains"]:
        assert len(set(item["choices"])) == 4
        assert len({" ".join(sorted((item["prompt"] + c).split())) for c in item["choices"]}) == 1


@pytest.mark.e2e
def test_the_right_choice_for_two_domains_joins_starts_to_their_own_ends(items, parts):
    held_out = "\n\n".join(text for part in parts.values() for text in part["held_out"])
    for item in items["two_domains"]:
        right = (item["prompt"] + item["choices"][item["answer"]]).split("\n\n")
        assert len(right) == 4
        assert all(stretch in held_out for stretch in right)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("answer", "expected"),
    [(" None:", 1), (" 1 else", 0), (" None:  # never", 1), (" None or undefined:", 0), ("", 0)],
)
def test_a_function_counts_if_it_runs_and_returns_a_value(answer, expected):
    item = {"prompt": "def f(x):\n    if x is", "rest": "\n        return False\n    return True", "call": "f('abc')"}
    assert local_tasks.runs(item, [answer]) == {"runs": expected}


@pytest.mark.e2e
def test_a_function_that_returns_nothing_does_not_count():
    assert local_tasks.runs({"prompt": "def f(x):\n    x", "rest": "", "call": "f(1)"}, [" = 1"]) == {"runs": 0}
