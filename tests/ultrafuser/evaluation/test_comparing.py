"""A comparison: every baseline has a row, the best comes first, and it is made once."""

import gc
import json
import weakref
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.tiny import VOCAB, specialist, stir_gate, tokenizer
from ultrafuser.build.specialist_edits import remove_specialist
from ultrafuser.cli.app import app
from ultrafuser.evaluation import contenders, evaluation_run
from ultrafuser.evaluation.baselines import ensemble
from ultrafuser.evaluation.comparison import compare_models
from ultrafuser.evaluation.contenders import Comparison, merged, trained_choice, tuned_constant
from ultrafuser.evaluation.evaluation_run import evaluate, left_out, tables, verdict
from ultrafuser.evaluation.measurement import cost, held_out, score


LINES = ["what is 2+2? it is 4", "def read(self): return 1", "the value of the expression", "x = 3 * y + 4"]


@pytest.fixture
def data():
    rows = [{"text": line} for line in LINES]
    return held_out(rows, tokenizer(), prompt_tokens=5)


# --- comparing -------------------------------------------------------------------------------------------------------


@pytest.fixture
def comparison(monkeypatch):
    """Specialists of one shape, so that everything applies."""
    monkeypatch.setattr(contenders, "cost", partial(cost, new_tokens=2, repeats=1))
    torch.manual_seed(1)
    specialists = {name: specialist("llama") for name in ("text", "code", "math")}
    model = UltraFuserForCausalLM.from_specialists(specialists)
    stir_gate(model)
    rows = [{"text": line} for line in LINES]
    domains = {d: held_out(rows[i : i + 2], tokenizer(), prompt_tokens=5) for i, d in enumerate(specialists)}
    domains["mixed"] = held_out(rows, tokenizer(), prompt_tokens=5)
    return Comparison(model, model, tokenizer(), domains, {}, base=specialist("llama"))


@pytest.mark.e2e
def test_every_baseline_has_a_row_and_the_best_comes_first(comparison, tmp_path):
    results = compare_models(comparison, tmp_path, more={"another": lambda: specialist("llama", layers=1)})
    names = [row["name"] for row in results["rows"]]
    assert {"fused", "uniform logits", "uniform probabilities", "random gate", "shuffled gate", "another"} < set(names)
    assert {"router: prompt perplexity", "prompt perplexity weights (PackLLM)", "text specialist"} < set(names)
    assert "fused, prompt perplexity as prior" in names
    anyhow = ("average", "ties", "dare", "task arithmetic", "breadcrumbs", "pcb", "model stock")
    assert {f"merge: {m}{d}" for m in anyhow for d in ("", " + LiNeS")} < {*names}
    assert {f"fused without {name}" for name in ("text", "code", "math")} < set(names)
    means = [row["mean"] for row in results["rows"]]
    assert means == sorted(means)
    oracle = "best specialist per domain (oracle)"
    tuned = {f"{oracle}, one temperature", f"{oracle}, a temperature per token"}
    unfit = {"merge: regmean", "merge: layer swap"}  # without tuning examples, and for two specialists
    assert set(results["left_out"]) == {"tuned constant weights", "router: trained", "gate by token", *tuned, *unfit}
    assert "fixed-share forecaster" in names
    by_name = {row["name"]: row for row in results["rows"]}
    for row in results["rows"]:
        assert row["mean"] == pytest.approx(sum(row["loss"][d] for d in ("text", "code", "math")) / 3)
        assert row["difference"] == pytest.approx(row["mean"] - by_name["fused"]["mean"], abs=1e-6)
    oracle = by_name["best specialist per domain (oracle)"]
    assert oracle["loss"]["text"] == min(by_name[f"{n} specialist"]["loss"]["text"] for n in ("text", "code", "math"))
    assert oracle["retention"] == 1
    assert oracle["cost"]["parameters"] == 3 * by_name["text specialist"]["cost"]["parameters"]
    # one shape, one cost: it is not timed again
    assert (
        by_name["merge: average"]["cost"] == by_name["text specialist"]["cost"] == by_name["math specialist"]["cost"]
    )
    assert by_name["another"]["cost"]["parameters"] < by_name["text specialist"]["cost"]["parameters"]
    assert json.loads(json.dumps(results)) == results
    assert tables(results)[0].row_count == len(names)


@pytest.fixture
def tunable(comparison):
    """The same, with examples to tune on: those that it is measured on, so that tuning shows."""
    comparison.tune = {d: x for d, x in comparison.data.items() if d != "mixed"}
    return comparison


def mean_loss(measured, data):
    return sum(measured.scores[d].losses[x.scored].mean().item() for d, x in data.items())


@pytest.mark.e2e
def test_tuned_constant_weights_beat_equal_ones_where_they_were_tuned(tunable):
    equal = tunable.run(ensemble(tunable.ingredients, "uniform"), "ensemble")
    tuned = tuned_constant(tunable)
    assert mean_loss(tuned, tunable.tune) < mean_loss(equal, tunable.tune) - 0.01
    assert sum(float(part.split()[1]) for part in tuned.note.split(", ")) == pytest.approx(1, abs=0.02)


def test_a_trained_router_repeats_what_was_best_on_what_it_was_trained_on(tunable):
    choose = trained_choice(tunable)
    for examples in tunable.tune.values():
        scores = [score(model, examples).losses * examples.scored for model in tunable.specialists.values()]
        best = torch.stack([s.sum(-1) for s in scores]).argmin(0)
        assert choose({}, examples).tolist() == best.tolist()


@pytest.mark.e2e
def test_a_merge_has_the_best_factor_and_one_copy_is_held_at_a_time(tunable, monkeypatch):
    made = []

    def merge(*args, **options):
        gc.collect()
        assert not any(model() for _, model in made)
        model = contenders.merge_alone(*args, **options)
        made.append((options["weight"], weakref.ref(model)))
        return model

    monkeypatch.setattr(contenders, "merge_alone", contenders.merge, raising=False)
    monkeypatch.setattr(contenders, "merge", merge)
    found = merged(tunable, "task_arithmetic", False)
    tried = [weight for weight, _ in made]
    assert tried[:-1] == [1 / 3, 0.5, 1.0]
    assert found.note == f"factor {tried[-1]:.2g}"
    losses = []
    for weight in tried[:-1]:
        model = contenders.merge_alone(tunable.specialists, "task_arithmetic", base=tunable.base, weight=weight)
        losses.append(mean_loss(tunable.run(model, "merge"), tunable.tune))
    assert mean_loss(found, tunable.tune) == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.e2e
def test_regmean_reads_tuning_rows_of_each_specialists_domain(tunable):
    found = merged(tunable, "regmean", False)
    assert (found.kind, found.note) == ("merge", "off-diagonals 0.9")
    tunable.tune = {"text": tunable.tune["text"]}
    with pytest.raises(contenders.UntunedError, match=r"has no domain called \['code', 'math'\]"):
        merged(tunable, "regmean", False)


@pytest.mark.e2e
def test_a_second_run_measures_only_what_is_missing_and_takes_up_no_scores_of_another(
    comparison, tmp_path, monkeypatch
):
    first = compare_models(comparison, tmp_path, identity={"run": 1})
    (tmp_path / "scores" / "uniform_logits.safetensors").unlink()
    ran = []
    run = Comparison.run
    monkeypatch.setattr(Comparison, "run", lambda self, *args, **more: ran.append(args) or run(self, *args, **more))
    comparison.found.clear()
    second = compare_models(comparison, tmp_path, identity={"run": 1})
    assert len(ran) == 1
    for row in (*first["rows"], *second["rows"]):
        row["cost"].pop("speed"), row["cost"].pop("tokens_per_second")
    assert second == first
    with pytest.raises(ValueError, match=r"with other run \(1 there, 2 here\)"):
        compare_models(comparison, tmp_path, identity={"run": 2})


@pytest.mark.slow
def test_merges_that_do_not_apply_are_left_out_with_the_reason(fused, data, tmp_path):
    results = compare_models(Comparison(fused, fused, tokenizer(), {"text": data}, {}), tmp_path)
    fitting = [name for name in results["left_out"] if not name.startswith("fused without")]
    assert len(fitting) == 4 + 2 * 7 + 2
    said = [line for line in left_out(results) if not line.startswith("Left out: fused without")]
    assert len(said) == 3
    assert "no base was given" in " ".join(said)
    assert "must have one shape" in " ".join(said)
    assert said[0].startswith(
        "Left out: best specialist per domain (oracle), one temperature, best specialist per domain (oracle), a temperature "
        "per token, tuned constant weights, router: trained, merge: regmean. It is tuned, but there are no"
    )


def test_a_contender_may_not_take_the_name_of_another(comparison, tmp_path):
    for name in ("fused", "Uniform_logits"):
        with pytest.raises(ValueError, match=f"{name!r} is, or is written like, one of"):
            compare_models(comparison, tmp_path, more={name: lambda: specialist("llama")})
    assert not list(tmp_path.iterdir())


def rows(**others):
    """A fused model of mean loss 2 and 30 parameters, and others by (difference, p, parameters)."""
    made = [{"name": "fused", "mean": 2.0, "cost": {"parameters_per_token": 30}}]
    for name, (difference, p, size) in others.items():
        cost = {"parameters_per_token": size}
        made.append({"name": name, "mean": 2 + difference, "difference": difference, "p": p, "cost": cost})
    return {"rows": sorted(made, key=lambda row: row["mean"])}


def test_the_verdict_names_who_is_surely_ahead_and_who_is_level_and_cheaper():
    worse = {"average": (0.5, 0.001, 10)}
    assert verdict(rows(**worse)) == "No rival is surely ahead of the fused model, at 5 % over all rivals together."
    ahead = {"joint": (-0.2, 0.001, 10), "another": (-0.1, 0.02, 10), **worse}
    assert verdict(rows(**ahead)) == "Fusing loses to 'joint' by 0.200 nats per token and to 1 more."
    level = {"router": (-0.01, 0.7, 10), "mixture": (0.01, 0.8, 30)}
    assert "; 'router' is level with it and reads fewer parameters per token." in verdict(rows(**level))


def test_one_of_many_rivals_is_not_surely_ahead_for_being_lucky():
    many = {f"rival {i}": (0.01 * i, 0.9, 10) for i in range(24)}
    assert "No rival is surely ahead" in verdict(rows(lucky=(-0.2, 0.03, 10), **many))
    assert "loses to 'lucky'" in verdict(rows(lucky=(-0.2, 0.001, 10), **many))


@pytest.mark.slow
def test_the_command_prints_the_tables_and_refuses_malformed_rows_before_loading(comparison, tmp_path):
    comparison.fused.save_pretrained(tmp_path / "fused")
    tokenizer().save_pretrained(tmp_path / "fused")
    for domain in ("text", "code"):
        (tmp_path / f"{domain}.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in LINES) + "\n")
    command = ["evaluate", str(tmp_path / "fused"), "--out", str(tmp_path / "out"), "--prompt-tokens", "5"]
    command += ["--data", f"text={tmp_path / 'text.jsonl'}", "--data", f"code={tmp_path / 'code.jsonl'}"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "router: prompt" in done.output
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"versions", "commit", "machine", "seed", "config"} < set(written)

    (tmp_path / "code.jsonl").write_text('{"text": "' + LINES[0] + '"}\n{"txt": 3}\n')
    (tmp_path / "fused" / "model.safetensors").unlink()
    refused = CliRunner().invoke(app, [*command[:3], str(tmp_path / "other"), *command[4:]])
    assert refused.exit_code == 2
    assert "code.jsonl, line 2: this row of domain 'code' has ['txt'], where rows have `text`" in refused.output


def test_rivals_that_cannot_be_compared_are_refused_before_anything_is_measured(fused, tmp_path):
    fused.save_pretrained(tmp_path / "fused")
    tokenizer().save_pretrained(tmp_path / "fused")
    specialist("llama").save_pretrained(tmp_path / "plain")
    tokenizer(swap="ae").save_pretrained(tmp_path / "plain")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": LINES[0]}))
    given = {"data": {"text": str(tmp_path / "text.jsonl")}, "out": tmp_path / "out", "prompt_tokens": 5}
    path = str(tmp_path / "fused")
    with pytest.raises(ValueError, match=r"holds a model of type 'llama'\. This is for a fused model"):
        evaluate(str(tmp_path / "plain"), **given)
    with pytest.raises(ValueError, match="models that read the same tokens, but '.*plain' makes"):
        evaluate(path, **given, also={"plain": str(tmp_path / "plain")})
    with pytest.raises(OSError, match="nowhere"):
        evaluate(path, **given, also={"plain": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match="there is no other"):
        evaluate(path, {"mixed": given["data"]["text"]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_examples_are_cut_to_the_models_context(comparison, tmp_path, monkeypatch):
    comparison.fused.config.max_position_embeddings = 20
    comparison.fused.save_pretrained(tmp_path / "fused")
    tokenizer().save_pretrained(tmp_path / "fused")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": LINES[2]}))
    seen = []
    monkeypatch.setattr(evaluation_run, "compare_models", lambda comparison, *_, **__: seen.append(comparison) or {})
    found = evaluate(str(tmp_path / "fused"), {"text": str(tmp_path / "text.jsonl")}, tmp_path, prompt_tokens=5)
    assert seen[0].data["text"].input_ids.shape == (1, 20)
    assert found["config"]["max_length"] == 20


def test_vocabulary_of_the_fixtures_is_that_of_the_tokenizer():
    assert len(tokenizer()) == VOCAB


def test_the_fused_model_without_one_is_measured_beside_it(comparison):
    found = contenders.without(comparison, "code")
    smaller = remove_specialist(comparison.fused, "code")
    for domain, examples in comparison.data.items():
        assert torch.equal(found.scores[domain].losses, score(smaller, examples).losses)
    assert found.cost["parameters"] < comparison.run(comparison.fused, "fused").cost["parameters"]


def test_a_model_of_two_is_not_measured_without_one():
    specialists = {name: specialist("llama") for name in ("text", "code")}
    model = UltraFuserForCausalLM.from_specialists(specialists)
    data = {"text": held_out([{"text": LINES[0]}], tokenizer(), prompt_tokens=5)}
    plan = contenders.contenders(Comparison(model, model, tokenizer(), data, {}))
    assert not [name for name in plan if name.startswith("fused without")]


def test_a_gate_that_cannot_keep_what_it_learned_is_left_out(comparison):
    torch.manual_seed(0)
    specialists = {name: specialist("llama", hidden_size=size) for name, size in {"a": 32, "b": 32, "c": 48}.items()}
    comparison.fused = UltraFuserForCausalLM.from_specialists(specialists, gate="mlp:8")
    with pytest.raises(contenders.UntunedError, match="train the gate"):
        contenders.without(comparison, "c")
