"""From a recipe to a trained gate, one command after the other, as a user types them."""

import json
from collections import Counter

import pytest
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import CHAT_TEMPLATE
from tests.support.teacher_server import TINY, TeacherServer, write_recipe
from tests.support.tiny import specialist, tokenizer
from ultrafuser.cli.app import app


DOMAINS = list(TINY["domains"])
STEPS, EACH = 4, 2
SMALL = {"examples_per_domain": EACH, "per_device_train_batch_size": EACH, "report_to": "none", "disable_tqdm": True}
SMALL |= {"logging_steps": STEPS, "max_length": 64, "learning_rate": 0.01}


def run(*words):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The folder in which all commands have run, what they said, and an instruction that is in an evaluation set."""
    work, said = tmp_path_factory.mktemp("chain"), {}
    with TeacherServer(faults=(20, "500")) as server:
        said["make"] = run("data", "make", write_recipe(work, server.url), "--out", work / "set")
    known = json.loads((work / "set/math.jsonl").read_text().splitlines()[0])["messages"][0]["content"]
    (work / "exam.jsonl").write_text(json.dumps({"question": known}) + "\n")
    flags = ["--against", f"exam={work / 'exam.jsonl'}", "--processes", 1]
    said["clean"] = run("data", "clean", work / "set/dataset", "--out", work / "cleaned", *flags)
    said["look"] = run("data", "look", work / "cleaned/kept.jsonl", "--out", work / "look", "--name", "tiny")

    model = UltraFuserForCausalLM.from_specialists({name: specialist(layers=1) for name in DOMAINS})
    model.save_pretrained(work / "fused")
    tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(work / "fused")
    flags = [word for key, value in SMALL.items() for word in (f"--{key}", value)]
    flags += ["--data", work / "cleaned/kept.jsonl", "--max-steps", STEPS]
    said["train"] = run("train", "--stage", "gate", "--model", work / "fused", "--out", work / "trained", *flags)
    return work, said, known


def kept(work):
    return [json.loads(line) for line in (work / "cleaned/kept.jsonl").read_text().splitlines()]


def test_every_command_names_what_the_next_one_takes(chain):
    work, said, _ = chain
    assert str(work / "set/dataset") in said["make"]
    assert str(work / "cleaned/kept.jsonl") in said["clean"]
    assert str(work / "look/index.html") in said["look"]
    assert str(work / "trained") in said["train"]


def test_what_is_made_is_kept_but_for_what_the_evaluation_set_holds_and_what_repeats(chain):
    work, _, known = chain
    report = json.loads((work / "cleaned/cleaning.json").read_text())
    dropped = [json.loads(line) for line in (work / "cleaned/dropped.jsonl").read_text().splitlines()]
    assert report["records"] == 44 == len(kept(work)) + len(dropped)
    assert {line["filter"] for line in dropped} <= {"contamination", "near_duplicate"}
    (found,) = [line for line in dropped if line["filter"] == "contamination"]
    assert found["record"]["messages"][0]["content"] == known
    assert all(Counter(row["domain"] for row in kept(work))[name] > 2 * EACH for name in DOMAINS)


def test_page_and_card_count_what_is_kept(chain):
    work, _, _ = chain
    rows = kept(work)
    statistics = json.loads((work / "look/statistics.json").read_text())
    assert statistics["records"] == len(rows)
    assert statistics["domains"] == Counter(row["domain"] for row in rows)
    assert statistics["duplicates"] == {"exact": 0, "near": 0}
    page, card = (work / "look/index.html").read_text(), (work / "look/README.md").read_text()
    assert "<svg" in page
    for name, count in statistics["domains"].items():
        assert f"| {name} | {count} |" in card
        assert name in page
    assert TINY["source"] in card


def test_the_trainer_draws_the_domains_evenly_from_what_is_kept(chain):
    work, _, _ = chain
    state = json.loads((work / f"trained/checkpoint-{STEPS}/trainer_state.json").read_text())
    (log,) = [entry for entry in state["log_history"] if "loss" in entry]
    sizes = Counter(row["domain"] for row in kept(work))
    draws = {name: round(log[f"epochs/{name}"] * sizes[name], 3) for name in DOMAINS}
    # there are more of text and of code than of mathematics
    assert len(set(sizes.values())) > 1
    # a quarter of what is drawn changes the domain on the way
    assert log["mix/mixed"] == 0.25
    assert draws == dict.fromkeys(DOMAINS, STEPS * EACH * 3 / 4)
    assert all(log[f"tokens/{name}"] > 0 for name in (*DOMAINS, "mixed"))
    UltraFuserForCausalLM.from_pretrained(work / "trained")
