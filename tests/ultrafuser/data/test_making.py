"""From a recipe to a made set, with a scripted teacher over real HTTP."""

import hashlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from datasets import load_from_disk
from rich.console import Console
from typer.testing import CliRunner

from tests.support.conversations import CHAT_TEMPLATE, changed, weights
from tests.support.foreseen_teacher import AsForeseen
from tests.support.teacher_server import TINY, TeacherServer, try_again_at_once, write_recipe
from tests.support.tiny import tokenizer
from trainers import GateStageConfig, GateTrainer, template_sandbox
from ultrafuser.cli.app import app
from ultrafuser.data.cost_plan import Plan
from ultrafuser.data.recipe import PROMPTS, load_recipe
from ultrafuser.data.synthesis import Maker, all_instructions, conversations
from ultrafuser.data.synthesis_run import make_set
from ultrafuser.data.teacher_output import read_items


ROOT = Path(__file__).parents[3]


def make(path, out):
    return make_set(load_recipe(path), out, console=Console(quiet=True))


def records(out, domain):
    return [json.loads(line) for line in (out / f"{domain}.jsonl").read_text().splitlines()]


def files(out):
    """Digests of everything that was made but the journal, whose lines are in the order in which replies came."""
    made = [path for path in out.rglob("*") if path.is_file() and path.name != "journal.jsonl"]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in made}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A recipe's data, made without trouble: folder, report, server."""
    out = tmp_path_factory.mktemp("made")
    with TeacherServer() as server:
        report = make(write_recipe(out, server.url), out / "set")
    return out / "set", report, server


@pytest.mark.e2e
def test_a_recipe_gives_what_it_says(made):
    out, report, _ = made
    assert report["stopped"] is None
    assert report["given_up"] == {}
    kinds = {name: Counter(r["kind"] for r in records(out, name)) for name in TINY["domains"]}
    # of 12 and 4 for pairs of skills, 30 % are rewritten
    assert [c.total() for c in kinds.values()] == [16, 16, 12]
    assert [c["harder"] for c in kinds.values()] == [5, 5, 4]
    for name, domain in TINY["domains"].items():
        before = [json.loads(line) for line in (out / "steps/skill_pairs.jsonl").read_text().splitlines()]
        before = Counter(row["kind"] for row in before if row["domain"] == name)
        pairs = 4 if "skills" in domain else 0
        assert before == {"seed": 4, "strong": 4, "weak": 4} | ({"skills": pairs} if pairs else {})
        rows = [json.loads(line) for line in (out / "steps/sub_topics.jsonl").read_text().splitlines()]
        assert len({row["topic"] for row in rows if row["domain"] == name}) == 2
        assert len({row["subtopic"] for row in rows if row["domain"] == name}) == 3


def test_every_record_is_a_conversation_of_the_schema(made):
    out, _, _ = made
    for name, domain in TINY["domains"].items():
        for record in records(out, name):
            roles = [message["role"] for message in record["messages"]]
            assert roles == ["user", "assistant"] * domain.get("turns", 1)
            assert all(message["content"] for message in record["messages"])
            assert (record["domain"], record["source"]) == (name, TINY["source"])
            assert record["licence"] == TINY["licence"]
            assert record["topic"]
            assert bool(record["skills"]) == (record["topic"] == "skills")


def test_the_data_set_is_the_records_of_all_domains(made):
    out, _, _ = made
    together = [record for name in TINY["domains"] for record in records(out, name)]
    assert load_from_disk(out / "dataset").to_list() == together


def test_the_plan_foresees_every_call(made):
    out, report, server = made
    plan = Plan(load_recipe(out.parent / "recipe.yaml"))
    sent = Counter((entry["step"], entry["domain"]) for entry in journal(out))
    assert {place: counts["calls"] for place, counts in plan.counts.items()} == sent
    assert plan.records == sum(sum(kinds.values()) for kinds in report["records"].values())
    assert set(server.counts().values()) == {1}


@pytest.mark.grid
@pytest.mark.e2e
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"items_per_request": 3, "text__turns": 3, "math__harder": 0},
        {"text__instructions": 401, "code__strong": 0, "code__weak": 0, "math__weak": 3, "items_per_request": 7},
        {"text__skills": {"number": 5, "together": 3, "pairs": 9, "across": 7}},
        {"text__meta_topics": 60, "text__sub_topics": 130, "text__instructions": 300, "code__skills": {"number": 90}},
    ],
)
def test_what_is_counted_is_what_following_the_recipe_asks_for(changes, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, **changes))
    plan, teacher = Plan(recipe), AsForeseen()
    maker = Maker(recipe, teacher)
    assert sum(1 for _ in conversations(maker, all_instructions(maker))) == plan.records
    assert plan.counts == teacher.counts


def journal(out):
    return [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]


def test_skills_meet_within_a_domain_and_across(made):
    rows = [json.loads(line) for line in (made[0] / "steps/skill_pairs.jsonl").read_text().splitlines()]
    own = {"text": set(), "code": set()}
    for entry in journal(made[0]):
        if entry["step"] == "skills":
            own[entry["domain"]] = set(json.loads(entry["reply"])["items"])
    for name, other in (("text", "code"), ("code", "text")):
        pairs = [row["skills"] for row in rows if row["domain"] == name and row["skills"]]
        assert sum(set(pair) <= own[name] for pair in pairs) == 2
        assert sum(pair[0] in own[name] and pair[1] in own[other] for pair in pairs) == 2


def test_the_same_journal_gives_the_same_bytes_without_a_server(made, tmp_path):
    out, report, _ = made
    shutil.copytree(out.parent, tmp_path / "copy")
    again = tmp_path / "copy" / "set"
    for path in again.iterdir():
        if path.name != "journal.jsonl":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    # replies may have come in any order
    lines = (again / "journal.jsonl").read_text().splitlines(keepends=True)
    (again / "journal.jsonl").write_text("".join(reversed(lines)))
    assert make(tmp_path / "copy" / "recipe.yaml", again) == report
    assert files(again) == files(out)


@pytest.mark.e2e
@pytest.mark.grid
@pytest.mark.parametrize("fault", ["429", "500", "disconnect", "half a body", "no JSON"])
def test_a_server_in_trouble_gives_the_same_data(fault, made, tmp_path, monkeypatch):
    try_again_at_once(monkeypatch)
    with TeacherServer(faults=(30, fault)) as server:
        path = write_recipe(tmp_path, server.url)
        report = make(path, tmp_path / "set")
    assert {**report, "recipe": 0} == {**made[1], "recipe": 0}
    # the recipe, which names the server's address, is in the report
    ours, theirs = files(tmp_path / "set"), files(made[0])
    assert {**ours, "report.json": 0} == {**theirs, "report.json": 0}


@pytest.mark.e2e
@pytest.mark.e2e
@pytest.mark.grid
@pytest.mark.parametrize("fault", ["no list", "empty", "cut off"])
def test_replies_that_cannot_be_used_are_asked_for_again(fault, tmp_path):
    with TeacherServer(faults=(7, fault)) as server:
        report = make(write_recipe(tmp_path, server.url, more_rounds=4), tmp_path / "set")
    assert report["given_up"] == {}
    assert {name: sum(kinds.values()) for name, kinds in report["records"].items()} == {
        "text": 16,
        "code": 16,
        "math": 12,
    }
    assert len(server.bodies) > Plan(load_recipe(tmp_path / "recipe.yaml")).total["calls"]


@pytest.mark.e2e
def test_what_is_given_up_is_counted_and_the_rest_is_made(tmp_path):
    # lists, which the first requests ask for, may be cut off
    with TeacherServer(faults=dict.fromkeys(range(85, 1000), "cut off")) as server:
        report = make(write_recipe(tmp_path, server.url, more_rounds=1), tmp_path / "set")
        given_up = sum(sum(domains.values()) for domains in report["given_up"].values())
        kept = make(write_recipe(tmp_path, server.url, more_rounds=1, keep_cut_off=True), tmp_path / "set")
    made_records = sum(sum(kinds.values()) for kinds in report["records"].values())
    assert report["stopped"] is None
    assert 0 < made_records < 44
    # a conversation that lacks only its second turn is not lost
    assert given_up >= 44 - made_records
    assert sum(sum(kinds.values()) for kinds in kept["records"].values()) == 44


@pytest.mark.e2e
def test_the_budget_keeps_what_is_answered_and_a_higher_one_goes_on(made, tmp_path):
    with TeacherServer() as server:
        path, out = (
            write_recipe(tmp_path, server.url, budget={"tokens": 15_000}, teacher__max_tokens=500),
            tmp_path / "set",
        )
        part = make(path, out)
        assert "The budget allows 15,000 (tokens)" in part["stopped"]
        assert part["tokens_in"] + part["tokens_out"] <= 15_000
        some = sum(sum(kinds.values()) for kinds in part["records"].values())
        assert 0 < some < 44
        assert len(load_from_disk(out / "dataset")) == some
        whole = make(write_recipe(tmp_path, server.url, teacher__max_tokens=500), out)
        assert whole["stopped"] is None
        assert set(server.counts().values()) == {1}
    assert {**whole, "recipe": 0}["records"] == made[1]["records"]


def test_a_teacher_that_stops_before_any_answer_leaves_an_earlier_set_alone(made, tmp_path):
    out = tmp_path / "set"
    shutil.copytree(made[0], out)
    path = write_recipe(tmp_path, text__description="Something else entirely.", teacher__retries=0)
    assert "could not be reached" in make(path, out)["stopped"]
    before, after = files(made[0]), files(out)
    assert {k: v for k, v in after.items() if "steps" not in k} == {
        k: v for k, v in before.items() if "steps" not in k
    }


@pytest.mark.e2e
def test_a_changed_prompt_asks_again_only_what_it_changes(made, tmp_path):
    out, own = tmp_path / "set", tmp_path / "own"
    shutil.copytree(made[0], out)
    own.mkdir()
    (own / "harder.md").write_text("Make this much harder: {{ instruction }}")
    with TeacherServer() as server:
        report = make(write_recipe(tmp_path, server.url, prompts="own"), out)
    assert report["stopped"] is None
    new = Counter(entry["step"] for entry in journal(out)[made[1]["replies"] :])
    # 14 rewritten, and their answers; 5 of them in the domain with a second turn
    assert new["harder"] == 14
    assert set(new) == {"harder", "answers", "turns"}
    assert len(server.bodies) == sum(new.values()) < 45


def test_a_made_set_trains_a_gate(made, fused, tmp_path):
    before = weights(fused)
    settings = {"max_steps": 2, "examples_per_domain": 2, "per_device_train_batch_size": 6, "max_length": 64}
    settings |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    data = load_from_disk(made[0] / "dataset").select_columns(["messages", "domain"])
    trainer = GateTrainer(
        fused,
        GateStageConfig(str(tmp_path), learning_rate=1e-2, **settings),
        data,
        processing_class=tokenizer(chat_template=CHAT_TEMPLATE),
    )
    trainer.train()
    assert {name.split(".")[1] for name in changed(fused, before)} == {"fusion_gate"}


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ('{"items": ["a", "b"]}', ["a", "b"]),
        ('["a", " b "]', ["a", "b"]),
        ('Sure [here]!\n```json\n{"topics": ["a", "b"]}\n```\nMore?', ["a", "b"]),
        ('{"items": [{"name": "a", "use": "b"}, {"name": "c"}]}', ["a: b", "c"]),
        ('{"items": ["a", "say \\"b\\"", "cut o', ["a", 'say "b"']),
        ('{"items": ["half \\ud83d a pair", "", 3]}', ["half ? a pair"]),
        ("I cannot.", []),
        ('{"items": []}', []),
        ('{"items": "a"}', []),
        ("[[[[", []),
    ],
)
def test_lists_are_read_out_of_what_models_write(text, items):
    assert read_items(text) == items


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bugdet": {}}, "bugdet: unknown key. Did you mean 'budget'?"),
        ({"teacher__temprature": 1}, "teacher.temprature: unknown key. Did you mean 'temperature'?"),
        ({"text__instruction": 5}, "domains.text.instruction: unknown key. Did you mean 'instructions'?"),
        ({"text__skills": {"number": 4, "pair": 2}}, "domains.text.skills.pair: unknown key. Did you mean 'pairs'?"),
        ({"math__harder": 3}, "domains.math.harder: Input should be less than or equal to 1, but it is 3."),
        ({"math__sub_topics": 1}, "meta_topics=2, sub_topics=1 and instructions=12"),
        ({"text__skills": {"number": 3, "pairs": 4}}, "domains.text.skills.pairs is at most 3"),
        ({"text__skills": {"number": 4, "together": 3, "pairs": 5}}, "domains.text.skills.pairs is at most 4"),
        (
            {"text__skills": {"number": 4, "together": 1}},
            "text.skills.together: Input should be greater than or equal to 2",
        ),
        ({"domains": {}}, "domains: "),
        ({"prompts": "nowhere"}, "nowhere' is not there"),
    ],
)
def test_a_recipe_with_a_mistake_is_refused_by_its_place(changes, words, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(words)):
        load_recipe(write_recipe(tmp_path, **changes))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("harder", "Harder: {{ instrction }}", "Did you mean {{ instruction }}?"),
        ("harder", "Harder, please.", "Without {{ instruction }} the prompt of step 'harder'"),
        ("harder", "Harder: {{ instruction", "harder.md' line 1"),
        ("answer", "Hello.", "['answer.md']"),
    ],
)
def test_a_prompt_with_a_mistake_is_refused_before_anything_is_sent(name, text, words, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / f"{name}.md").write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)):
        load_recipe(write_recipe(tmp_path, prompts="own"))


@pytest.mark.e2e
@pytest.mark.grid
@pytest.mark.parametrize(
    "attack",
    [
        "{% for c in description.__class__.__mro__[1].__subclasses__() %}{% if c.__name__ == '_wrap_close' %}"
        "{{ c.__init__.__globals__['system']('touch PWNED') }}{% endif %}{% endfor %}",
        "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}",
        "{{ 9 ** (9 ** (9 ** 9)) }}",
    ],
)
@pytest.mark.parametrize("command", ["plan", "make"])
def test_a_prompt_that_comes_with_a_recipe_runs_no_code_and_holds_nothing_up(attack, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(template_sandbox, "SECONDS", 3.0)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "meta_topics.md").write_text("{{ number }} {{ description }} " + attack)
    done = cli(command, write_recipe(tmp_path, prompts="own"), *(["--out", "set"] if command == "make" else []))
    assert done.exit_code == 2
    assert "meta_topics" in done.output
    assert not (tmp_path / "PWNED").exists()


def test_every_prompt_of_the_package_is_one_of_a_step(tmp_path):
    load_recipe(write_recipe(tmp_path, prompts=str(PROMPTS)))


def test_the_recipe_of_the_papers_size_has_the_papers_counts():
    recipe = load_recipe(ROOT / "examples/recipes/ultrachat.yaml")
    counts = {n: (d.meta_topics, d.sub_topics, d.instructions) for n, d in recipe.domains.items()}
    assert counts == {"text": (30, 1100, 100_000), "code": (21, 407, 100_000), "math": (21, 80, 110_000)}
    assert [sum(c) for c in zip(*counts.values(), strict=True)] == [72, 1587, 310_000]


def cli(*arguments):
    return CliRunner().invoke(app, ["data", *map(str, arguments)], env={"COLUMNS": "120"})


def test_the_plan_is_printed_and_nothing_sent(tmp_path):
    with TeacherServer() as server:
        path = write_recipe(tmp_path, server.url, teacher__price_in=1, teacher__price_out=2, budget={"money": 0.05})
        done = cli("plan", path)
    assert done.exit_code == 0
    assert "44 conversations, about" in done.stdout
    assert "4 characters per token" in done.stdout
    assert "it ends at about" in done.stdout
    assert server.bodies == []


def test_much_is_not_made_unasked(tmp_path):
    path = write_recipe(tmp_path, teacher__price_out=1000)
    done = cli("make", path, "--out", tmp_path / "set")
    assert done.exit_code == 2
    assert "Pass --yes" in done.stderr
    assert not (tmp_path / "set").exists()


def test_mistakes_are_told_in_words_by_the_command(tmp_path):
    done = cli("make", write_recipe(tmp_path, bugdet={}), "--out", tmp_path / "set")
    assert done.exit_code == 2
    assert "Did you mean 'budget'?" in done.stderr
    assert isinstance(done.exception, SystemExit)
    path = write_recipe(tmp_path, teacher__retries=0)
    done = cli("make", path, "--out", tmp_path / "set", "--yes")
    assert done.exit_code == 1
    assert "could not be reached in one try" in done.stderr
