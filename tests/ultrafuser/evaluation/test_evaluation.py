"""What is measured on held-out text, how sure it is, and that a comparison is made once."""

import gc
import json
import weakref

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import CHAT_TEMPLATE
from tests.support.tiny import VOCAB, specialist, stir_gate, tokenizer
from ultrafuser.cli.app import app
from ultrafuser.evaluation import contenders, evaluation_run, measurement
from ultrafuser.evaluation.baselines import (
    RandomGate,
    RequestGate,
    ShuffledGate,
    ensemble,
    perplexity_weights,
    prompt_losses,
    select,
    tempered,
    train_router,
)
from ultrafuser.evaluation.comparison import compare
from ultrafuser.evaluation.contenders import Comparison, merged, trained_choice, tuned_constant
from ultrafuser.evaluation.evaluation_run import evaluate, left_out, tables, verdict
from ultrafuser.evaluation.measurement import HeldOut, Scores, cost, held_out, score
from ultrafuser.evaluation.resampling import calibration_error, flips, interval, per_example, permutation_test
from ultrafuser.row_files import parse


LINES = ["what is 2+2? it is 4", "def read(self): return 1", "the value of the expression", "x = 3 * y + 4"]


@pytest.fixture
def data():
    rows = [{"text": line} for line in LINES]
    return held_out(rows, tokenizer(), prompt_tokens=5)


def by_specialist(model, data):
    return {name: score(model.specialist(name), data) for name in model.config.specialist_names}


# --- measuring -------------------------------------------------------------------------------------------------------


def test_only_tokens_behind_the_prompt_are_scored(data):
    for row, line in enumerate(LINES):
        assert data.attention_mask[row].sum() == len(line)
        assert data.scored[row].nonzero().flatten().tolist() == list(range(5, len(line)))
        assert data.prompt[row].nonzero().flatten().tolist() == list(range(5))


def test_of_a_conversation_the_last_response_and_its_end_are_scored():
    tok = tokenizer(chat_template=CHAT_TEMPLATE)
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    data = held_out([{"messages": messages}], tok)
    assert tok.decode(data.input_ids[0][data.scored[0]]) == "4</s>"


def test_a_batch_scores_as_single_examples_do(fused, data):
    together = score(fused, data)
    for row in range(len(data)):
        length = data.attention_mask[row].sum()
        ids = data.input_ids[row : row + 1, :length]
        alone = HeldOut(ids, torch.ones_like(ids), data.scored[row : row + 1, :length])
        torch.testing.assert_close(score(fused, alone).losses[0], together.losses[row, :length], rtol=1e-4, atol=1e-5)


def test_a_batch_holds_no_more_logits_than_allowed(fused, data, monkeypatch):
    whole = score(fused, data)
    monkeypatch.setattr(measurement, "LOGITS", 2 * data.input_ids.shape[1] * VOCAB)
    batches = []
    by_two = score(fused, data, before=batches.append)
    assert [(rows.start, rows.stop) for rows in batches] == [(0, 2), (2, 4)]
    torch.testing.assert_close(by_two.losses[data.scored], whole.losses[data.scored], rtol=1e-4, atol=1e-5)


def test_mean_loss_is_the_models_own(fused, data):
    row = data.first(1)
    length = row.attention_mask.sum()
    labels = row.input_ids.where(row.scored, -100)[:, :length]
    own = fused(input_ids=row.input_ids[:, :length], labels=labels).loss
    sums, counts = per_example(score(fused, row), row)
    assert sums[0] / counts[0] == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prose": "hello"}, "row 2 has {'prose': 'str'}"),
        ({"text": None}, "row 2 has"),
        ({"messages": [{"role": "user", "content": "2+2?"}]}, "row 2"),
    ],
)
def test_a_malformed_row_is_named(row, said):
    with pytest.raises(ValueError, match="eld-out row") as error:
        held_out([{"text": LINES[0]}, row], tokenizer(chat_template=CHAT_TEMPLATE), prompt_tokens=5)
    assert said in str(error.value)


def test_rows_too_short_to_be_scored_are_counted_and_left_out():
    data = held_out([{"text": LINES[0]}, {"text": "hi"}, {"text": LINES[1]}], tokenizer(), prompt_tokens=5)
    assert (len(data), data.skipped) == (2, 1)
    with pytest.raises(ValueError, match="none of the 1 rows has any"):
        held_out([{"text": "hi"}], tokenizer(), prompt_tokens=5)


def test_a_line_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"\n')
    with pytest.raises(ValueError, match=r"text\.jsonl, line 2: this row of domain 'text' is no JSON"):
        list(parse(str(path), "domain 'text'"))


def test_cost_counts_what_is_held_and_what_is_read(fused, specialists):
    price = cost(fused, specialists["text"], torch.arange(4)[None], new_tokens=2, repeats=1)
    total = sum(p.numel() for p in fused.parameters())
    tables_ = sum(m.get_input_embeddings().weight.numel() for m in fused.model.specialists.values())
    assert price["parameters"] == total
    assert price["parameters_per_token"] == total - tables_
    assert price["bytes"] == 4 * total
    # keys and values of 2 key-value heads in 2, 3 and 4 layers, 8, 8 and 12 wide, 4 bytes each
    assert price["cache_bytes_per_token"] == 2 * 4 * 2 * (2 * 8 + 3 * 8 + 4 * 12)
    assert price["tokens_per_second"] > 0


def test_a_tied_head_is_read_for_every_token():
    model = specialist("llama", tied=True)
    price = cost(model, model, torch.arange(4)[None], new_tokens=2, repeats=1)
    assert price["parameters_per_token"] == price["parameters"]


def test_layers_without_keys_have_no_part_in_what_a_token_adds_to_the_cache():
    mixer = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
    model = specialist("bamba", layers=3, attn_layer_indices=[1], **mixer)
    price = cost(model, model, torch.arange(4)[None], new_tokens=2, repeats=1)
    # keys and values of 2 heads in one layer, 8 wide, 4 bytes each
    assert price["cache_bytes_per_token"] == 2 * 4 * 2 * 8


# --- statistics ------------------------------------------------------------------------------------------------------


def test_an_interval_of_equal_examples_is_a_point():
    assert interval([(np.full(9, 6.0), np.full(9, 3.0))]) == pytest.approx([2.0, 2.0])


def test_an_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        sums = rng.normal(3.0, 1.0, size=60)
        low, high = interval([(sums, np.ones(60))], samples=400, level=0.9, seed=trial)
        covered += low <= 3.0 <= high
    # 90 % of 200, give or take three standard errors, and what percentiles of 60 examples lack
    assert 160 <= covered <= 193


def test_domains_count_alike_whatever_their_size():
    few, many = (np.full(2, 1.0), np.ones(2)), (np.full(200, 3.0), np.ones(200))
    assert interval([few, many]) == pytest.approx([2.0, 2.0])


def test_a_real_difference_is_found_and_none_is_not_invented():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=50)
    assert permutation_test([(noise + 1.0, np.ones(50))]) < 0.001
    found = [permutation_test([(rng.normal(size=30), np.ones(30))], samples=500, seed=s) for s in range(200)]
    assert np.mean(np.array(found) < 0.1) == pytest.approx(0.1, abs=0.07)


def test_flips_and_retention_are_those_of_a_loop(data):
    def guesses(seed):
        correct = torch.rand(data.scored.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
        return Scores(torch.zeros_like(correct, dtype=torch.float), correct, correct.float())

    here, there = guesses(0), guesses(1)
    pairs = list(zip(here.correct[data.scored].tolist(), there.correct[data.scored].tolist(), strict=True))
    found = flips(here, there, data)
    assert found["positive_flips"] == pytest.approx(sum(h and not t for h, t in pairs) / len(pairs))
    assert found["negative_flips"] == pytest.approx(sum(t and not h for h, t in pairs) / len(pairs))
    assert found["retention"] == pytest.approx(sum(h and t for h, t in pairs) / sum(t for _, t in pairs))


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    confidence = torch.tensor([0.95, 0.95, 0.15, 0.15])
    correct = torch.tensor([True, False, False, False])
    # two bins: 0.95 against one half, 0.15 against none
    assert calibration_error(confidence, correct, bins=10) == pytest.approx((0.45 + 0.15) / 2, abs=1e-6)


# --- baselines -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_ensembles_are_the_averages_they_are_named_for(fused):
    ids = torch.arange(3, 40)[None]
    logits = torch.stack([fused.specialist(n)(input_ids=ids).logits for n in fused.config.specialist_names])
    by_logits = ensemble(fused, "uniform")(input_ids=ids).logits
    torch.testing.assert_close(by_logits, logits.mean(0), rtol=1e-4, atol=1e-4)
    mixture = ensemble(fused, "uniform", "probabilities")(input_ids=ids).logits
    torch.testing.assert_close(mixture.softmax(-1), logits.softmax(-1).mean(0), rtol=1e-4, atol=1e-5)


def test_an_ensemble_shares_its_tensors_and_leaves_the_model_as_it_was(fused):
    before = fused.config.to_dict()
    other = ensemble(fused, "uniform", "probabilities")
    assert other.lm_head is fused.lm_head
    assert other.model.specialists is fused.model.specialists
    assert fused.config.to_dict() == before


def test_controls_give_weights_of_the_same_kind_to_other_tokens(fused):
    ids = torch.arange(3, 43)[None]
    own = fused.gate_weights(ids)
    shuffled = ensemble(fused, ShuffledGate(fused.config, fused.model.fusion_gate)).gate_weights(ids)
    assert not torch.equal(own, shuffled)
    for column in range(3):
        torch.testing.assert_close(own[0, :, column].sort().values, shuffled[0, :, column].sort().values)
    drawn = ensemble(fused, RandomGate(fused.config)).gate_weights(ids)
    torch.testing.assert_close(drawn.sum(-1), torch.ones(1, 40))
    assert drawn.std(dim=1).min() > 0.1


def test_a_shuffled_gate_gives_no_token_the_weights_of_padding(fused, data):
    ids, mask = data.input_ids, data.attention_mask
    own = fused.gate_weights(ids, attention_mask=mask)
    gate = ShuffledGate(fused.config, fused.model.fusion_gate)
    gate.lengths = mask.sum(-1)
    shuffled = ensemble(fused, gate).gate_weights(ids, attention_mask=mask)
    assert len(set(gate.lengths.tolist())) > 1
    for row, length in enumerate(gate.lengths):
        assert not torch.equal(own[row, :length], shuffled[row, :length])
        torch.testing.assert_close(own[row, :length].sort(0).values, shuffled[row, :length].sort(0).values)


def test_one_hot_weights_for_a_request_are_that_specialist(fused):
    gate = RequestGate(fused.config)
    gate.weights = torch.eye(3)
    ids = torch.arange(3, 40).expand(3, -1)
    with torch.no_grad():
        logits = ensemble(fused, gate)(input_ids=ids).logits
        for row, name in enumerate(fused.config.specialist_names):
            expected = fused.specialist(name)(input_ids=ids[:1]).logits[0]
            torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)


def test_perplexity_of_the_prompt_alone_decides(fused, data):
    scores = by_specialist(fused, data)
    losses = prompt_losses(scores, data)
    for row in range(len(data)):
        for k, name in enumerate(scores):
            assert losses[row, k].item() == pytest.approx(scores[name].losses[row, 1:5].mean().item(), rel=1e-5)
    torch.testing.assert_close(perplexity_weights(scores, data).argmax(-1), losses.argmin(-1))


def test_selecting_takes_each_examples_chosen_specialist(fused, data):
    scores = by_specialist(fused, data)
    chosen = torch.tensor([2, 0, 1, 2])
    picked = select(scores, chosen)
    for row, k in enumerate(chosen.tolist()):
        assert torch.equal(picked.losses[row], list(scores.values())[k].losses[row])


def test_a_router_learns_who_answers_what():
    prompts = [f"def f{i}(self): return" for i in range(20)] + [f"What is {i} * {i + 1}?" for i in range(20)]
    router = train_router(prompts, [0] * 20 + [1] * 20)
    assert router.predict(["def read(self, size):", "What is 99 * 12?"]).tolist() == [0, 1]


def test_a_router_that_saw_one_specialist_win_everywhere_chooses_it():
    assert train_router(["one prompt", "another"], [2, 2]).predict(["a third"]).tolist() == [2]


# --- comparing -------------------------------------------------------------------------------------------------------


@pytest.fixture
def comparison():
    """Specialists of one shape, so that everything applies."""
    torch.manual_seed(1)
    specialists = {name: specialist("llama") for name in ("text", "code", "math")}
    model = UltraFuserForCausalLM.from_specialists(specialists)
    stir_gate(model)
    rows = [{"text": line} for line in LINES]
    domains = {d: held_out(rows[i : i + 2], tokenizer(), prompt_tokens=5) for i, d in enumerate(specialists)}
    domains["mixed"] = held_out(rows, tokenizer(), prompt_tokens=5)
    return Comparison(model, model, tokenizer(), domains, {}, base=specialist("llama"))


def test_every_baseline_has_a_row_and_the_best_comes_first(comparison, tmp_path):
    results = compare(comparison, tmp_path, more={"another": lambda: specialist("llama", layers=1)})
    names = [row["name"] for row in results["rows"]]
    assert {"fused", "uniform logits", "uniform probabilities", "random gate", "shuffled gate", "another"} < set(names)
    assert {"router: prompt perplexity", "prompt perplexity weights (PackLLM)", "text specialist"} < set(names)
    assert {f"merge: {m}{d}" for m in ("average", "ties", "dare", "task arithmetic") for d in ("", " + LiNeS")} < {
        *names
    }
    means = [row["mean"] for row in results["rows"]]
    assert means == sorted(means)
    oracle = "best specialist per domain (oracle)"
    tuned = {f"{oracle}, one temperature", f"{oracle}, a temperature per token"}
    assert set(results["left_out"]) == {"tuned constant weights", "router: trained", *tuned}
    assert "fixed-share forecaster" in names
    by_name = {row["name"]: row for row in results["rows"]}
    for row in results["rows"]:
        assert row["mean"] == pytest.approx(sum(row["loss"][d] for d in ("text", "code", "math")) / 3)
        assert row["difference"] == pytest.approx(row["mean"] - by_name["fused"]["mean"], abs=1e-6)
    oracle = by_name["best specialist per domain (oracle)"]
    assert oracle["loss"]["text"] == min(by_name[f"{n} specialist"]["loss"]["text"] for n in ("text", "code", "math"))
    assert oracle["retention"] == 1
    assert oracle["cost"]["parameters"] == 3 * by_name["text specialist"]["cost"]["parameters"]
    assert json.loads(json.dumps(results)) == results
    assert tables(results)[0].row_count == len(names)


@pytest.fixture
def tunable(comparison):
    """The same, with examples to tune on: those that it is measured on, so that tuning shows."""
    comparison.tune = {d: x for d, x in comparison.data.items() if d != "mixed"}
    return comparison


def mean_loss(measured, data):
    return sum(measured.scores[d].losses[x.scored].mean().item() for d, x in data.items())


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


def test_a_second_run_measures_only_what_is_missing_and_takes_up_no_scores_of_another(
    comparison, tmp_path, monkeypatch
):
    first = compare(comparison, tmp_path, identity={"run": 1})
    (tmp_path / "scores" / "uniform_logits.safetensors").unlink()
    ran = []
    run = Comparison.run
    monkeypatch.setattr(Comparison, "run", lambda self, *args, **more: ran.append(args) or run(self, *args, **more))
    comparison.found.clear()
    second = compare(comparison, tmp_path, identity={"run": 1})
    assert len(ran) == 1
    for row in (*first["rows"], *second["rows"]):
        row["cost"].pop("speed"), row["cost"].pop("tokens_per_second")
    assert second == first
    with pytest.raises(ValueError, match=r"there \{'run': 1\}, here \{'run': 2\}"):
        compare(comparison, tmp_path, identity={"run": 2})


def test_merges_that_do_not_apply_are_left_out_with_the_reason(fused, data, tmp_path):
    results = compare(Comparison(fused, fused, tokenizer(), {"text": data}, {}), tmp_path)
    assert len(results["left_out"]) == 4 + 8
    said = left_out(results)
    assert len(said) == 3
    assert "no base was given" in " ".join(said)
    assert "must have one shape" in " ".join(said)
    assert said[0].startswith(
        "Left out: best specialist per domain (oracle), one temperature, best specialist per domain (oracle), a temperature "
        "per token, tuned constant weights, router: trained. It is tuned, but there are no"
    )


def test_a_contender_may_not_take_the_name_of_another(comparison, tmp_path):
    for name in ("fused", "Uniform_logits"):
        with pytest.raises(ValueError, match=f"{name!r} is, or is written like, one of"):
            compare(comparison, tmp_path, more={name: lambda: specialist("llama")})
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
    assert verdict(rows(**worse)) == "Nothing that was compared is surely ahead of the fused model."
    ahead = {"joint": (-0.2, 0.001, 10), "another": (-0.1, 0.02, 10), **worse}
    assert verdict(rows(**ahead)) == "Fusing loses to 'joint' by 0.200 nats per token and to 1 more."
    level = {"router": (-0.01, 0.7, 10), "mixture": (0.01, 0.8, 30)}
    assert "; 'router' is level with it and reads fewer parameters per token." in verdict(rows(**level))


def test_one_of_many_rivals_is_not_surely_ahead_for_being_lucky():
    many = {f"rival {i}": (0.01 * i, 0.9, 10) for i in range(24)}
    assert "Nothing that was compared" in verdict(rows(lucky=(-0.2, 0.03, 10), **many))
    assert "loses to 'lucky'" in verdict(rows(lucky=(-0.2, 0.001, 10), **many))


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
    with pytest.raises(ValueError, match=r"is of type 'llama'\. Pass a fused model first"):
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
    monkeypatch.setattr(evaluation_run, "compare", lambda comparison, *_, **__: seen.append(comparison) or {})
    found = evaluate(str(tmp_path / "fused"), {"text": str(tmp_path / "text.jsonl")}, tmp_path, prompt_tokens=5)
    assert seen[0].data["text"].input_ids.shape == (1, 20)
    assert found["config"]["max_length"] == 20


def test_vocabulary_of_the_fixtures_is_that_of_the_tokenizer():
    assert len(tokenizer()) == VOCAB


@pytest.mark.parametrize("gate", ["constant", "cross"])
def test_a_lone_specialist_starts_as_itself_and_its_temperature_learns(gate, tunable):
    index, name = 1, tunable.ingredients.config.specialist_names[1]
    domain, examples = next(iter(tunable.tune.items()))
    model = tempered(tunable.ingredients, gate, index)
    itself = score(tunable.specialists[name], examples)
    torch.testing.assert_close(score(model, examples).losses, itself.losses, rtol=1e-4, atol=1e-5)
    before = {key: tensor.clone() for key, tensor in tunable.ingredients.state_dict().items()}
    contenders._tune(model, tunable, {domain: examples}, learning_rate=1e-2)
    assert score(model.eval(), examples).losses[examples.scored].mean() < itself.losses[examples.scored].mean()
    assert all(torch.equal(tensor, before[key]) for key, tensor in tunable.ingredients.state_dict().items())


def test_the_calibrated_oracle_is_ahead_of_the_oracle_where_it_was_tuned(tunable):
    tunable.found |= {f"{n} specialist": tunable.run(s, "specialist") for n, s in tunable.specialists.items()}
    oracle = contenders.routed(tunable, contenders.best_per_domain)
    calibrated = contenders.calibrated_oracle(tunable, ["constant"])
    for domain, examples in tunable.tune.items():
        ahead = oracle.scores[domain].losses - calibrated.scores[domain].losses
        assert ahead[examples.scored].mean() > 0
    assert set(calibrated.scores) == set(tunable.data)
    assert calibrated.cost == oracle.cost


def half_by_chance(model, rows, steps=30):
    """Rows in which what comes after an even token is what a model holds likeliest, and after an odd one chance."""
    ids = torch.randint(3, VOCAB, (rows, 1))
    for _ in range(steps):
        with torch.no_grad():
            likeliest = model(ids).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, likeliest.where(ids[:, -1:] % 2 == 0, torch.randint(3, VOCAB, (rows, 1)))], -1)
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, 0] = False
    return HeldOut(ids, torch.ones_like(ids), scored)


@pytest.mark.parametrize(("rows", "taken", "other"), [(8, "constant", "cross"), (160, "cross", "constant")])
def test_a_temperature_per_token_is_taken_if_it_helps_beyond_what_it_was_fitted_on(rows, taken, other, comparison):
    """From few rows it is learned by heart, from many it is learned."""
    comparison.tune, comparison.data = (
        {"text": half_by_chance(comparison.specialists["text"], n)} for n in (rows, 16)
    )
    comparison.found |= {f"{n} specialist": comparison.run(s, "specialist") for n, s in comparison.specialists.items()}
    found = {}
    for gates in (["constant"], ["cross"], ["constant", "cross"]):
        torch.manual_seed(0)
        found["+".join(gates)] = contenders.calibrated_oracle(comparison, gates).scores["text"].losses
    assert torch.equal(found["constant+cross"], found[taken])
    examples = comparison.data["text"]
    assert found[taken][examples.scored].mean() < found[other][examples.scored].mean() - 0.05
