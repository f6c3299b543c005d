"""Picking from a pool: each specialist is read once by itself, and the set is measured as its fusion would be."""

import gc
import json
import weakref
from itertools import combinations

import pytest
import torch
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.adapted import make
from tests.support.tiny import specialist, tokenizer
from ultrafuser.build import picking
from ultrafuser.build.picking import choose, mixture_loss, pick
from ultrafuser.cli.app import app
from ultrafuser.evaluation.measurement import HeldOut, held_out, mean_loss, score


pytestmark = pytest.mark.e2e


LINES = ["what is 2+2? it is 4", "def read(self): return 1", "the value of the expression", "x = 3 * y + 4"]


@pytest.fixture
def pool(tmp_path):
    """Four specialists as folders, one with more rows than the others, and two domains of rows."""
    torch.manual_seed(4)
    for name, rows in {"a": 99, "b": 99, "c": 104, "d": 99}.items():
        specialist(layers=1, vocab_size=rows).save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    for domain, lines in {"text": LINES[:3], "code": LINES[1:]}.items():
        (tmp_path / f"{domain}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return tmp_path


def pick_of(pool, keep, names="abcd", **settings):
    data = {d: str(pool / f"{d}.jsonl") for d in ("text", "code")}
    places = {name: (str(pool / name), None) for name in names}
    return pick(places, keep, data, pool / "picked", prompt_tokens=5, say=lambda _: None, **settings)


def test_losses_are_those_of_the_fused_model_of_these_specialists(pool):
    picks = pick_of(pool, 3)
    assert [p.picked for p in picks] == [True, True, True, False]
    for number in (2, 3, 4):
        sources = {p.name: pool / p.name for p in picks[:number]}
        model = UltraFuserForCausalLM.from_specialists(sources, gate="posterior", fusion="probabilities")
        for domain, lines in {"text": LINES[:3], "code": LINES[1:]}.items():
            rows = held_out([{"text": line} for line in lines], tokenizer(), prompt_tokens=5)
            assert picks[number - 1].losses[domain] == pytest.approx(mean_loss(model, rows), abs=1e-5)


def test_a_larger_vocabulary_is_cut_to_that_of_the_pool(pool):
    rows = held_out([{"text": LINES[0]}], tokenizer(), prompt_tokens=5)
    model = specialist(layers=1, vocab_size=104)
    whole, cut = score(model, rows).losses, score(model, rows, vocab_size=99).losses
    assert (cut[rows.scored] < whole[rows.scored]).all()


def test_one_specialist_is_in_memory_at_a_time_and_each_is_read_once(pool, monkeypatch):
    loaded, load = [], picking.load_specialist

    def watched(*args, **options):
        gc.collect()
        assert not any(model() for model in loaded)
        model = load(*args, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(picking, "load_specialist", watched)
    first = pick_of(pool, 2)
    assert len(loaded) == 4
    # run again, with another number and one more specialist
    specialist(layers=1).save_pretrained(pool / "e")
    tokenizer().save_pretrained(pool / "e")
    again = pick_of(pool, 3, names="abcde")
    assert len(loaded) == 5
    assert {p.name for p in first} < {p.name for p in again}


def test_a_run_that_was_killed_reads_the_rest(pool, monkeypatch):
    load = picking.load_specialist
    monkeypatch.setattr(
        picking, "load_specialist", lambda name, *args, **o: 1 / (name != "c") and load(name, *args, **o)
    )
    with pytest.raises(ZeroDivisionError):
        pick_of(pool, 2)
    read = []
    monkeypatch.setattr(
        picking, "load_specialist", lambda name, *args, **o: read.append(name) or load(name, *args, **o)
    )
    pick_of(pool, 2)
    assert read == ["c", "d"]


def test_weights_or_rows_that_changed_are_read_anew(pool, monkeypatch):
    pick_of(pool, 2)
    read, load = [], picking.load_specialist
    monkeypatch.setattr(
        picking, "load_specialist", lambda name, *args, **o: read.append(name) or load(name, *args, **o)
    )
    specialist(layers=1).save_pretrained(pool / "b")
    pick_of(pool, 2)
    assert read == ["b"]
    with (pool / "code.jsonl").open("a") as file:
        file.write(json.dumps({"text": LINES[0]}) + "\n")
    pick_of(pool, 2)
    assert read == ["b", *"abcd"]


# --- the choice ------------------------------------------------------------------------------------------------------


DOMAINS = ("text", "code", "math")


@pytest.fixture
def data():
    whole = torch.ones(4, 40, dtype=torch.int64)
    return {d: HeldOut(whole, whole, whole.bool() & (torch.arange(40) > 7)) for d in DOMAINS}


def opinions(data, **best):
    """Log-probabilities of specialists: a number for each domain."""
    made = {}
    for k, (name, levels) in enumerate(best.items()):
        noise = torch.randn(4, 40, generator=torch.Generator().manual_seed(k)) * 0.1
        made[name] = {d: noise - level for d, level in zip(DOMAINS, levels, strict=True)}
    return made


def test_the_useful_ones_are_found_among_copies(data):
    useful = {"text": (1.0, 6.0, 6.0), "code": (6.0, 1.2, 6.0), "math": (6.0, 6.0, 1.4)}
    copies = {f"{name}_{k}": levels for name, levels in useful.items() for k in range(3)}
    picks = choose(opinions(data, **copies), data, 3)
    assert {p.name.split("_")[0] for p in picks if p.picked} == set(useful)
    means = [p.mean for p in picks]
    assert means[2] < means[1] - 1
    assert min(means[3:]) > means[2] - 0.1


def test_a_generalist_that_was_picked_first_is_exchanged_for_the_last_specialist(data):
    made = opinions(data, all=(3.0, 3.0, 3.0), text=(1.0, 6.0, 6.0), code=(6.0, 1.0, 6.0), math=(6.0, 6.0, 1.0))
    alone = {name: sum(mixture_loss([own[d]], data[d]) for d in DOMAINS) for name, own in made.items()}
    assert min(alone, key=alone.get) == "all"
    picks = choose(made, data, 3)
    assert {p.name for p in picks if p.picked} == set(DOMAINS)
    assert choose(made, data, 2)[0].name == "all"


def test_no_exchange_of_one_is_better(data):
    levels = torch.rand(7, 3, generator=torch.Generator().manual_seed(0)) * 4
    made = opinions(data, **{f"s{k}": tuple(row.tolist()) for k, row in enumerate(levels)})
    picks = choose(made, data, 3)

    def mean(names):
        return sum(mixture_loss([made[n][d] for n in names], data[d]) for d in DOMAINS) / 3

    assert picks[2].mean == pytest.approx(mean([p.name for p in picks[:3]]), abs=1e-6)
    near = [{*pair, new} for pair in combinations([p.name for p in picks[:3]], 2) for new in made if new not in pair]
    assert min(map(mean, near)) >= picks[2].mean - 2e-6


def test_all_of_the_pool_are_put_into_order(data):
    made = opinions(data, a=(1.0, 6.0, 6.0), b=(2.0, 2.0, 2.0))
    picks = choose(made, data, 2)
    assert [(p.name, p.picked) for p in picks] == [("b", True), ("a", True)]


# --- the command -----------------------------------------------------------------------------------------------------


def run(pool, *words):
    data = [word for d in ("text", "code") for word in ("--data", f"{d}={pool / d}.jsonl")]
    words = ["pick", *words, *data, "--prompt-tokens", 5, "--out", pool / "picked"]
    done = CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "300"})
    return done.exit_code, done.output


def test_the_command_says_how_to_fuse_what_it_picked(pool):
    code, shown = run(pool, pool / "a", pool / "b", f"third={pool / 'c'}", "--keep", 2)
    assert code == 0, shown
    picks = json.loads((pool / "picked/results.json").read_text())["picks"]
    places = {"a": pool / "a", "b": pool / "b", "third": pool / "c"}
    words = [f"{p['name']}={places[p['name']]}" for p in picks if p["picked"]]
    assert shown.splitlines()[-1] == f"ultrafuser fuse {' '.join(words)} --out FOLDER"
    fused = CliRunner().invoke(app, ["fuse", *words, "--out", str(pool / "fused")])
    assert fused.exit_code == 0, fused.output


@pytest.mark.parametrize(("keep", "said"), [(1, "at least two"), (3, "Pick 2 to 2")])
def test_numbers_that_cannot_be_picked_are_refused(pool, keep, said):
    code, shown = run(pool, pool / "a", pool / "b", "--keep", keep)
    assert code == 2
    assert said in shown
    assert not (pool / "picked").exists()


def test_a_specialist_with_another_tokenizer_is_refused_before_any_is_loaded(pool, monkeypatch):
    monkeypatch.setattr(picking, "load_specialist", lambda *_, **__: pytest.fail("weights were read"))
    tokenizer(swap="ab").save_pretrained(pool / "b")
    code, shown = run(pool, pool / "a", pool / "b", pool / "d", "--keep", 2)
    assert code == 2
    assert "different tokenizer" in shown


def test_adapters_are_for_prune(pool, tmp_path_factory):
    adapters = make(tmp_path_factory.mktemp("adapters"))
    code, shown = run(pool, *(f"{name}={folder}" for name, folder in adapters.items()), "--keep", 2)
    assert code == 2
    assert "ultrafuser prune" in shown
