"""Ensembles, controls, routers and oracles: what they are named for."""

import pytest
import torch

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.tiny import VOCAB, specialist, stir_gate, tokenizer
from ultrafuser.evaluation import contenders
from ultrafuser.evaluation.baselines import (
    RandomGate,
    ShuffledGate,
    by_token,
    ensemble,
    perplexity_weights,
    prompt_losses,
    select,
    tempered,
)
from ultrafuser.evaluation.contenders import Comparison
from ultrafuser.evaluation.measurement import HeldOut, held_out, score


LINES = ["what is 2+2? it is 4", "def read(self): return 1", "the value of the expression", "x = 3 * y + 4"]


@pytest.fixture
def data():
    rows = [{"text": line} for line in LINES]
    return held_out(rows, tokenizer(), prompt_tokens=5)


def by_specialist(model, data):
    return {name: score(model.specialist(name), data) for name in model.config.specialist_names}


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


@pytest.mark.parametrize("gate", ["mlp", "cross:8+calibration", "evidence:8", "constant"])
def test_a_gate_by_token_has_the_means_of_the_gate_over_the_data(gate, specialists, data):
    fused = UltraFuserForCausalLM.from_specialists(specialists, gate=gate)
    stir_gate(fused)
    looked_up = ensemble(fused, by_token(fused, [data[:2], data[2:]]))
    read = data.attention_mask.bool()
    own = fused.model(input_ids=data.input_ids, attention_mask=data.attention_mask)
    # a token that is often there, and one that never is
    often = int(data.input_ids[read].mode().values)
    never = next(i for i in range(VOCAB) if i not in data.input_ids[read])
    found = looked_up.model(input_ids=torch.tensor([[never, often, never, often]]))
    expected = {often: read & (data.input_ids == often), never: read}
    assert expected[often].sum() > 3
    for place, token in enumerate([never, often, never, often]):
        weights = own.gate_weights[expected[token]].mean(0)
        torch.testing.assert_close(found.gate_weights[0, place], weights, atol=1e-5, rtol=1e-4)
        if fused.config.gate_calibration:
            scales = own.logit_scales[expected[token]].log().mean(0).exp()
            torch.testing.assert_close(found.logit_scales[0, place], scales, atol=1e-5, rtol=1e-4)
    # a gate that says the same of every token is such a table
    if gate == "constant":
        torch.testing.assert_close(
            looked_up(data.input_ids).logits, fused(data.input_ids).logits, atol=1e-5, rtol=1e-5
        )


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


@pytest.fixture
def tunable(comparison):
    """The same, with examples to tune on: those that it is measured on, so that tuning shows."""
    comparison.tune = {d: x for d, x in comparison.data.items() if d != "mixed"}
    return comparison


def rows(**others):
    """A fused model of mean loss 2 and 30 parameters, and others by (difference, p, parameters)."""
    made = [{"name": "fused", "mean": 2.0, "cost": {"parameters_per_token": 30}}]
    for name, (difference, p, size) in others.items():
        cost = {"parameters_per_token": size}
        made.append({"name": name, "mean": 2 + difference, "difference": difference, "p": p, "cost": cost})
    return {"rows": sorted(made, key=lambda row: row["mean"])}


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


def test_the_row_of_the_gate_by_token_is_tabled_from_tuning_examples(tunable):
    found = contenders.looked_up(tunable)
    table = by_token(tunable.fused, tunable.tune.values())
    expected = score(ensemble(tunable.fused, table), tunable.data["mixed"])
    assert torch.equal(found.scores["mixed"].losses, expected.losses)
    own = score(tunable.fused, tunable.data["mixed"])
    assert not torch.equal(own.losses, expected.losses)
    tunable.tune = {}
    with pytest.raises(contenders.UntunedError, match="--tune"):
        contenders.looked_up(tunable)


@pytest.mark.e2e
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


@pytest.mark.e2e
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
