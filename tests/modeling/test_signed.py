"""Signed weights, against the sum that one writes down: large + tuned - base."""

import copy
import json
import math

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM

from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM, configuration_ultrafuser
from modeling_ultrafuser.refusals_ultrafuser import Refusal
from modeling_ultrafuser.serving_ultrafuser import check_servable
from tests.support.mixes import prompt
from tests.support.stages import build
from tests.support.tiny import specialist, stir_gate, tokenizer
from trainers import GateTrainer, JointTrainer
from trainers.gate_cache import CachedGateTrainer
from ultrafuser.build.fusion_recipe import FusionRecipe, FusionSettings
from ultrafuser.build.specialist_edits import add_specialist, remove_specialist
from ultrafuser.check.checks import judge
from ultrafuser.decoding.drafting import self_draft
from ultrafuser.decoding.dropping import check_droppable
from ultrafuser.decoding.stacking import stack
from ultrafuser.evaluation.baselines import ensemble
from ultrafuser.evaluation.comparison import gate_statistics
from ultrafuser.evaluation.contenders import UntunedError, weighted_by_perplexity
from ultrafuser.evaluation.measurement import held_out
from ultrafuser.reports.explanation import Token, are_signed
from ultrafuser.route.prompt_route import PromptRoute
from ultrafuser.serve.demo import steered


NAMES = ("large", "tuned", "base")
PROXY = {"base": -1, "large": 1, "tuned": 1}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    sizes = {"large": 64, "tuned": 32, "base": 32}
    return {name: specialist("llama", hidden_size=size, layers=1) for name, size in sizes.items()}


def fuse(models, signed=PROXY, gate="uniform", **options):
    model = UltraFuserForCausalLM.from_specialists(models, gate=gate, signed_weights=signed, **options)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def by_hand(models, ids, weights=(1, 1, -1)):
    return sum(w * models[name](ids).logits for name, w in zip(NAMES, weights, strict=True))


@torch.no_grad()
def test_logits_are_large_plus_tuned_minus_base_and_generate_follows_them(models):
    model, ids = fuse(models), prompt()
    torch.testing.assert_close(model(ids).logits, by_hand(models, ids), **CLOSE)
    assert model(ids).gate_weights[0, 0].tolist() == [1, 1, -1]
    written = ids
    for _ in range(6):
        written = torch.cat([written, by_hand(models, written)[:, -1:].argmax(-1)], dim=1)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), written)
    assert torch.equal(model.generate(ids, custom_generate=self_draft, **options), written)


@torch.no_grad()
def test_specialists_of_one_shape_are_stacked_with_any_signs():
    models, ids = {name: specialist("llama", layers=1) for name in NAMES}, prompt()
    torch.testing.assert_close(stack(fuse(models))(ids).logits, by_hand(models, ids), **CLOSE)


@torch.no_grad()
def test_one_for_a_single_specialist_is_that_specialist_and_equal_numbers_are_the_uniform_gate(models):
    ids = prompt()
    torch.testing.assert_close(fuse(models, [1, 0, 0])(ids).logits, models["large"](ids).logits, **CLOSE)
    uniform = UltraFuserForCausalLM.from_specialists(models, gate="uniform")
    torch.testing.assert_close(fuse(models, [1 / 3] * 3)(ids).logits, uniform(ids).logits, **CLOSE)


@pytest.mark.parametrize("gate", ["mlp:16", "cross:8+calibration", "linear", "constant", "evidence:8"])
def test_a_gate_that_learns_adds_its_scores_over_the_temperature(gate, models):
    model, ids = fuse(models, [1, 0, 0], gate, gate_temperature=2.0), prompt()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, models["large"](ids).logits, **CLOSE)
        stir_gate(model)
        outputs = model(ids)
        start = torch.tensor([1.0, 0.0, 0.0])
        shares = copy.deepcopy(model)
        shares.model.fusion_gate.signed = None
        plain = shares(ids).gate_weights
        # the softmax of the same scores, which are the weights without their start
        torch.testing.assert_close((outputs.gate_weights - start).softmax(-1), plain, **CLOSE)
        each = torch.stack([models[name](ids).logits for name in NAMES], -1)
        scale = 1 if outputs.logit_scales is None else outputs.logit_scales
        torch.testing.assert_close(outputs.logits, scale * (each @ outputs.gate_weights[..., None])[..., 0], **CLOSE)


@pytest.mark.parametrize("trainer", [GateTrainer, CachedGateTrainer, JointTrainer])
def test_the_loss_in_training_is_that_of_the_sum_and_so_are_the_gates_gradients(trainer, models, tmp_path):
    model = fuse(models, [1, 0.5, -1], "linear")
    stir_gate(model)
    twin = copy.deepcopy(model).train()
    cached = {"cache": tmp_path / "cache"} if trainer is CachedGateTrainer else None
    stage = build(trainer, model, tmp_path, cached=cached, max_steps=1, optim="sgd", learning_rate=1.0)
    draws = list(stage.sampler)[: stage.sampler.batch_size]
    stage.sampler.batches_drawn = 0
    stage.args.max_grad_norm = 0
    rows = (stage.rows if trainer is CachedGateTrainer else stage.train_dataset).select(draws)
    collator = getattr(stage.data_collator, "collator", stage.data_collator)
    batch = collator([dict(row) for row in rows])
    stage.train()
    logits = twin(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    logged = next(entry for entry in stage.state.log_history if "loss" in entry)
    assert logged["loss"] == pytest.approx(loss.item(), abs=2e-4)
    assert logged["gate_entropy/text"] >= 0
    gate, before = stage.fused.model.fusion_gate, twin.model.fusion_gate
    torch.testing.assert_close(gate.weight, before.weight - before.weight.grad, rtol=1e-4, atol=1e-5)


def test_terms_on_shares_and_a_cache_of_the_likeliest_words_are_rejected(models, tmp_path):
    model = fuse(models, [1, 0, 0], "linear")
    for term in ("gate_balance", "gate_entropy", "gate_domain"):
        own = {"gate_domain_target": "best"} if term == "gate_domain" else {}
        with pytest.raises(ValueError, match=rf"\['{term}'\] are terms on shares .* `signed_weights`"):
            build(GateTrainer, model, tmp_path, **{term: 0.1, **own})
    with pytest.raises(ValueError, match=r"and signed weights a cache keeps one of \['hidden'\]"):
        build(CachedGateTrainer, model, tmp_path, cached={"cache": tmp_path / "cache", "keep": "top"})


@torch.no_grad()
def test_a_loaded_model_is_the_saved_one_and_older_code_refuses_its_folder(models, tmp_path, monkeypatch):
    model, ids = fuse(models), prompt()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    # of one attention geometry they are for vLLM, too
    check_servable(fuse({name: specialist("llama", layers=1) for name in NAMES}).config)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["format_version"], written["signed_weights"]) == (2, [1.0, 1.0, -1.0])
    monkeypatch.setattr(configuration_ultrafuser, "FORMAT_VERSION", 1)
    with pytest.raises(ValueError, match="up to format 1, but this one is in format 2"):
        UltraFuserConfig.from_pretrained(tmp_path)


def test_a_folder_without_them_says_nothing_of_them(models, tmp_path):
    UltraFuserForCausalLM.from_specialists(models, gate="uniform").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["format_version"] == 1
    assert "signed_weights" not in written


REFUSED = {
    "too few": ({"signed_weights": [1, -1]}, r"`signed_weights` is \[1, -1\]\. Signed weights are one finite number .* Give 3"),
    "no number": ({"signed_weights": [1, 1, float("inf")]}, "one finite number"),
    "not a number": ({"signed_weights": [1, 1, float("nan")]}, "one finite number"),
    "a word": ({"signed_weights": "1,1,-1"}, "one finite number"),
    "zeros": ({"signed_weights": [0, 0, 0]}, "not all of them 0"),
    "no such name": ({"signed_weights": {"large": 1, "tuned": 1, "small": -1}}, r"\['large', 'small', 'tuned'\].*Give one"),
    "probabilities": ({"fusion": "probabilities"}, "`fusion` is 'probabilities' and `signed_weights`.*weights that are shares"),
    "a sparsifier": ({"gate_sparsifier": "top_k:2"}, "`gate_sparsifier` is 'top_k:2' and `signed_weights`.*are no shares"),
    "a posterior": ({"gate": "posterior"}, "`gate` is 'posterior' and `signed_weights`.*logarithms of shares"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_with_signed_weights_is_rejected_by_name(case, models):
    choices, message = REFUSED[case]
    with pytest.raises(Refusal, match=message):
        UltraFuserForCausalLM.from_specialists(models, **{"gate": "uniform", "signed_weights": PROXY} | choices)


def test_bounded_logits_priors_dropping_and_steering_are_rejected(models):
    bounded = {name: specialist("gemma2", layers=1, final_logit_softcapping=1.5) for name in NAMES}
    with pytest.raises(Refusal, match="bound their logits .*not the sum of the specialists' bounded logits"):
        fuse(bounded)
    model = fuse(models)
    with pytest.raises(ValueError, match="`gate_prior` multiplies shares .* are signed"):
        model(prompt(), gate_prior=torch.ones(2, 3))
    with pytest.raises(ValueError, match="Dropping keeps .* `signed_weights` are"):
        check_droppable(model)
    with pytest.raises(ValueError, match="weights are signed"), steered(model.model.fusion_gate, 2.0):
        pass


@torch.no_grad()
def test_a_newcomer_begins_at_0_and_a_number_goes_with_its_specialist(models, tmp_path):
    model, ids = fuse(models, gate="constant"), prompt()
    specialist("llama", layers=1).save_pretrained(tmp_path)
    more = add_specialist(model, "new", tmp_path)
    assert more.config.signed_weights == [1, 1, -1, 0]
    torch.testing.assert_close(more(ids).logits, model(ids).logits, **CLOSE)
    less = remove_specialist(model, "tuned")
    assert less.config.signed_weights == [1, -1]
    torch.testing.assert_close(less(ids).logits, by_hand(models, ids, (1, 0, -1)), **CLOSE)


def test_the_last_specialist_with_a_number_cannot_be_taken_out(models):
    model = fuse(models, {"large": 1, "tuned": 0, "base": 0}, gate="constant")
    told = r"weights of \['tuned', 'base'\] are all 0.*Keep one of \['large'\], or take .*ultrafuser specialist FOLDER"
    with pytest.raises(Refusal, match=told):
        remove_specialist(model, "large")


def test_a_check_tells_once_what_does_not_go_together(models, tmp_path):
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    found = judge({n: (str(tmp_path / n), None) for n in models}, gate="posterior", signed_weights=[1, 1, -1]).findings
    assert len([f for f in found if "`gate` is 'posterior'" in f.text]) == 1


def test_statistics_of_the_gate_have_the_entropy_of_the_sizes(models):
    data = held_out([{"text": "2+2=4, 3+3=6"}], tokenizer(), prompt_tokens=1)
    found = gate_statistics(fuse(models), {"sums": data})
    assert found["entropy"]["sums"] == pytest.approx(math.log(3))
    assert found["mean_weights"]["sums"] == {"large": 1, "tuned": 1, "base": -1}


@torch.no_grad()
def test_ensembles_of_its_specialists_have_shares(models):
    assert ensemble(fuse(models), "uniform")(prompt()).gate_weights.sum(-1).allclose(torch.tensor(1.0))


def test_recipes_carry_them_and_a_sum_other_than_one_is_told(models, tmp_path):
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    folders = {name: str(tmp_path / name) for name in models}
    recipe = FusionRecipe(FusionSettings(folders, gate="uniform", signed_weights=PROXY | {"tuned": 2}))
    told = [f.text for f in recipe.plan().findings if f.about == "gate"]
    assert told == ["`signed_weights` sum to 2: the fused model is as sure as if its logits were multiplied by that."]
    assert recipe.choose({"signed_weights": PROXY}).fusion.choices()["signed_weights"] == [1, 1, -1]


def test_the_leader_has_the_largest_weight_of_either_sign():
    weights = {"large": 1.0, "tuned": 0.5, "base": -1.5}
    assert Token("a", 1, weights=weights).leader == "base"
    assert are_signed(weights)
    assert not are_signed({"large": 0.25, "tuned": 0.5, "base": 0.25})


def test_a_router_and_a_row_of_priors_are_refused(models):
    model = fuse(models)
    with pytest.raises(ValueError, match="weights are signed. Let the chosen specialist answer alone"):
        PromptRoute(model, tokenizer(), "perplexity")
    assert PromptRoute(model, tokenizer(), "perplexity", alone=True).alone
    with pytest.raises(UntunedError, match="weights are signed"):
        weighted_by_perplexity(None, model)
