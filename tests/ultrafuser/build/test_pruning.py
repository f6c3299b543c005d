"""Pruning: every subset is measured as the model that would be left, and the best one is written."""

import json
from functools import partial
from itertools import combinations

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.adapted import make
from tests.support.fusions import MIXTURES
from tests.support.tiny import GATE_WORDS, specialist, stir_gate, tokenizer
from ultrafuser.build.pruning import check_number, rank_subsets
from ultrafuser.build.specialist_edits import keep_specialists, remove_specialist
from ultrafuser.cli.app import app
from ultrafuser.evaluation import measurement
from ultrafuser.evaluation.measurement import held_out, mean_loss


pytestmark = pytest.mark.e2e


LINES = ["what is 2+2? it is 4", "def read(self): return 1", "the value of the expression", "x = 3 * y + 4"]
NAMES = ("text", "code", "math", "law")


def fused_model(gate="mlp", fusion="logits", *, number=3, last=32, **choices):
    torch.manual_seed(2)
    sizes = [32] * (number - 1) + [last]
    models = {n: specialist(layers=1, hidden_size=size) for n, size in zip(NAMES, sizes, strict=False)}
    model = UltraFuserForCausalLM.from_specialists(models, gate=gate, fusion=fusion, gate_hidden_size=16, **choices)
    stir_gate(model)
    return model


@pytest.fixture
def data():
    read = partial(held_out, tokenizer=tokenizer(), prompt_tokens=5)
    return {"text": read([{"text": LINES[0]}, {"text": LINES[2]}]), "code": read([{"text": LINES[1]}])}


def losses(model, data):
    return {domain: mean_loss(model, examples) for domain, examples in data.items()}


def assert_as_measured_alone(model, keep, data):
    every, *subsets = rank_subsets(model, keep, data)
    assert every.losses == pytest.approx(losses(model, data), abs=1e-5)
    possible = combinations(model.config.specialist_names, keep)
    assert {s.names for s in subsets} == {names for names in possible if model.config.gate_anchor in (None, *names)}
    for subset in subsets:
        assert subset.losses == pytest.approx(losses(keep_specialists(model, subset.names), data), abs=1e-5)
    means = [s.mean for s in subsets]
    assert means == sorted(means)
    assert means[-1] > means[0]


@pytest.mark.grid
@pytest.mark.parametrize("fusion", MIXTURES)
@pytest.mark.parametrize("gate", GATE_WORDS)
def test_the_table_has_what_the_models_that_would_be_left_are_measured_at(gate, fusion, data):
    calibrated = GATE_WORDS[gate].can_calibrate
    assert_as_measured_alone(fused_model(gate, fusion, gate_calibration=calibrated, gate_temperature=2.0), 2, data)


@pytest.mark.grid
@pytest.mark.parametrize("fusion", MIXTURES)
@pytest.mark.parametrize("gate", ["mlp", "cross", "evidence"])
@torch.no_grad()
def test_the_distance_is_the_divergence_from_what_all_predict(gate, fusion, data):
    model = fused_model(gate, fusion)

    def predicted(model, examples):
        logits = model(examples.input_ids, attention_mask=examples.attention_mask).logits[:, :-1]
        return torch.distributions.Categorical(logits=logits[examples.scored[:, 1:]].double())

    every, *subsets = rank_subsets(model, 2, data, "distance")
    assert every.losses == {"text": 0, "code": 0}
    for subset in subsets:
        part = keep_specialists(model, subset.names).eval()
        for domain, examples in data.items():
            divergence = torch.distributions.kl_divergence(predicted(model, examples), predicted(part, examples))
            assert subset.losses[domain] == pytest.approx(divergence.mean().item(), rel=1e-3, abs=1e-6)
    means = [s.mean for s in subsets]
    assert means == sorted(means)
    assert means[0] > 1e-3


def test_two_of_four_of_different_widths_are_measured_likewise(data):
    model = fused_model("cross", number=4, last=48)
    assert_as_measured_alone(model, 2, data)
    assert_as_measured_alone(model, 3, data)


def test_logits_of_few_tokens_at_once_give_the_same_numbers(data, monkeypatch):
    model = fused_model("cross")
    whole = rank_subsets(model, 2, data)
    monkeypatch.setattr("ultrafuser.build.pruning.LOGITS", 3 * 7 * model.config.vocab_size)
    by_few = rank_subsets(model, 2, data)
    assert [s.names for s in by_few] == [s.names for s in whole]
    for one, other in zip(by_few, whole, strict=True):
        assert one.losses == pytest.approx(other.losses, abs=1e-5)


def test_every_specialist_reads_every_text_once(data):
    model = fused_model("evidence", number=4)
    calls = []
    for backbone in model.model.specialists.children():
        backbone.register_forward_hook(lambda *_: calls.append(1))
    rank_subsets(model, 2, data)
    assert len(calls) == 4 * len(data)


@pytest.mark.parametrize("gate", ["cross:16", "posterior"])
@pytest.mark.parametrize("ends", [False, True])
def test_adapters_of_one_base_are_pruned_likewise(ends, gate, data, tmp_path):
    model = UltraFuserForCausalLM.from_specialists(make(tmp_path, ends=ends), gate=gate)
    stir_gate(model)
    assert_as_measured_alone(model, 2, data)


def test_a_specialist_without_weight_goes(data):
    model = fused_model("constant")
    with torch.no_grad():
        model.model.fusion_gate.logits.copy_(torch.tensor([0.3, -1e4, -0.2]))
    every, best, *_ = rank_subsets(model, 2, data)
    assert best.names == ("text", "math")
    assert best.losses == pytest.approx(every.losses, abs=1e-6)


def test_to_keep_some_is_to_remove_the_others_one_by_one():
    model = fused_model("cross", number=4)
    kept = keep_specialists(model, ["text", "math"])
    removed = remove_specialist(remove_specialist(model, "law"), "code")
    one, other = kept.state_dict(), removed.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert kept.config.to_dict() == removed.config.to_dict()


def test_a_subset_that_the_gate_has_no_weights_for_is_missing(data):
    # first layers by hidden size: those of two of one size, learned apart, are no single one
    _, *subsets = rank_subsets(fused_model("mlp", last=48), 2, data)
    assert {s.names for s in subsets} == {("text", "math"), ("code", "math")}


@pytest.mark.parametrize(
    ("number", "keep", "said"),
    [(3, 1, "ultrafuser specialist FOLDER NAME"), (3, 4, "there are 3"), (20, 10, "184,756 subsets of 10")],
)
def test_numbers_that_cannot_be_kept_are_refused(number, keep, said):
    with pytest.raises(ValueError, match=said):
        check_number([f"s{k}" for k in range(number)], keep)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    fused_model("constant").save_pretrained(tmp_path / "fused")
    tokenizer().save_pretrained(tmp_path / "fused")
    (tmp_path / "fused/specialists.json").write_text(json.dumps({n: {"source": f"owner/{n}"} for n in NAMES[:3]}))
    for domain, line in zip(("text", "code"), LINES, strict=False):
        (tmp_path / f"{domain}.jsonl").write_text(json.dumps({"text": line}) + "\n")
    return tmp_path


def prune(folder, *words):
    data = [word for d in ("text", "code") for word in ("--data", f"{d}={folder / d}.jsonl")]
    words = ["prune", folder / "fused", *data, "--prompt-tokens", 5, "--out", folder / "new", *words]
    done = CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "120"})
    return done.exit_code, done.output


def test_the_command_writes_the_best_subset_as_remove_would(folder):
    code, shown = prune(folder, "--keep", 2)
    assert code == 0, shown
    new = AutoModelForCausalLM.from_pretrained(folder / "new")
    names = new.config.specialist_names
    [gone] = set(NAMES[:3]) - set(names)
    rows = [line for line in shown.splitlines() if "," in line and "." in line]
    assert [", ".join(n) in row for n, row in zip((NAMES[:3], names), rows, strict=False)] == [True, True]
    assert list(json.loads((folder / "new/specialists.json").read_text())) == names
    CliRunner().invoke(app, ["remove", str(folder / "fused"), gone, "--out", str(folder / "removed")])
    for file in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (folder / "new" / file).read_bytes() == (folder / "removed" / file).read_bytes()


def test_the_command_writes_the_nearest_subset(folder):
    code, shown = prune(folder, "--keep", 2, "--by", "distance")
    assert code == 0, shown
    assert "divergence from the predictions of all" in shown
    names = AutoModelForCausalLM.from_pretrained(folder / "new").config.specialist_names
    rows = [line for line in shown.splitlines() if "," in line and "." in line]
    assert [", ".join(n) in row for n, row in zip((NAMES[:3], names), rows, strict=False)] == [True, True]


def test_to_keep_all_is_to_copy(folder):
    code, shown = prune(folder, "--keep", 3)
    assert code == 0
    assert "it is a copy" in shown
    assert "train it again" not in shown
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (folder / "new" / file).read_bytes() == (folder / "fused" / file).read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--keep", 1), "at least two"),
        (("--keep", 4), "there are 3"),
        (("--keep", 2, "--by", "luck"), "['loss', 'distance']"),
        (("--max-length", 5, "--keep", 2), "none of the 1"),
    ],
)
def test_what_cannot_be_pruned_is_refused_before_weights_are_read(words, said, folder, monkeypatch):
    monkeypatch.setattr("ultrafuser.build.pruning.open_fused", lambda _: pytest.fail("weights were read"))
    code, shown = prune(folder, *words)
    assert code == 2
    assert said in shown
    assert not (folder / "new").exists()


def test_a_domain_of_mixed_items_alone_is_refused(folder):
    words = [
        "prune",
        folder / "fused",
        "--keep",
        2,
        "--data",
        f"mixed={folder / 'text.jsonl'}",
        "--out",
        folder / "new",
    ]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 2
    assert measurement.MIXED in done.output
