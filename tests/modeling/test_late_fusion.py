"""Late rules, contrast and dynamic, against sums that one writes down."""

import json
import math

import pytest
import torch
from datasets import Dataset
from transformers import ContinuousBatchingConfig, GenerationConfig

from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM, configuration_ultrafuser
from modeling_ultrafuser.fusions_ultrafuser import fusion_class
from modeling_ultrafuser.refusals_ultrafuser import Refusal
from modeling_ultrafuser.serving_ultrafuser import check_servable
from tests.support.adapted import make
from tests.support.mixes import prompt
from tests.support.stages import build
from tests.support.tiny import specialist, stir_gate, tokenizer
from trainers import DistilConfig, DistilTrainer, GateTrainer, JointTrainer
from ultrafuser.build.pruning import rank_subsets
from ultrafuser.build.specialist_edits import add_specialist, remove_specialist
from ultrafuser.decoding.drafting import self_draft
from ultrafuser.decoding.dropping import check_droppable
from ultrafuser.decoding.stacking import stack
from ultrafuser.route.prompt_route import PromptRoute
from ultrafuser.route.router_base import Router
from ultrafuser.serve.demo import stream


NAMES = ["large", "tuned", "base"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# the rule, and the gate that it goes with
RULES = {
    "contrast": "mlp",
    "contrast:0.8,0.02": "evidence",
    "contrast:0.5,0.1,base": "mlp",
    "dynamic:large,base": "uniform",
}
every_rule = pytest.mark.parametrize("rule", RULES)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    sizes = {"large": 64, "tuned": 32, "base": 32}
    return {name: specialist("llama", hidden_size=size, layers=1) for name, size in sizes.items()}


def fuse(models, rule, **options):
    torch.manual_seed(1)
    options = {"gate": RULES.get(rule, "mlp"), "fusion": rule, **options}
    model = UltraFuserForCausalLM.from_specialists(models, **options)
    stir_gate(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def contrasted(strong, weak, strength=0.5, cutoff=0.1):
    """Contrast of two lists of logits, a number at a time."""
    least = max(strong) + math.log(cutoff)
    pairs = zip(strong, weak, strict=True)
    return [s + strength * (s - w) if s >= least else -math.inf for s, w in pairs]


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def softmax(logits):
    total = sum(map(math.exp, logits))
    return [math.exp(z) / total for z in logits]


def shifted(large, base, tuned):
    """Dynamic fusion, with divergences as they are defined: the factor, and the distribution."""
    before, after, start = softmax(base), softmax(tuned), softmax(large)
    shift = [t - b for t, b in zip(tuned, base, strict=True)]
    tried = []
    for i in range(21):
        moved = softmax([z + i / 10 * d for z, d in zip(large, shift, strict=True)])
        away = divergence(moved, start) - divergence(after, before)
        back = divergence(start, moved) - divergence(before, after)
        tried.append((away**2 + back**2, i / 10, moved))
    return min(tried)[1:]


def by_hand(models, rule, ids, weights):
    """The rule's log-probabilities, from the specialists' own logits and the gate's weights. Shape as of the logits."""
    logits = [models[name](ids).logits for name in NAMES]
    rows = []
    for b in range(ids.shape[0]):
        for t in range(ids.shape[1]):
            own, shares = [z[b, t].tolist() for z in logits], weights[b, t].tolist()
            rows.append(_predicted(rule, own, shares))
    return torch.tensor(rows).view(*ids.shape, -1)


def _predicted(rule, own, shares):
    if rule.startswith("dynamic"):
        _, moved = shifted(own[0], own[2], own[1])
        return [math.log(p) for p in moved]
    _, _, setting = rule.partition(":")
    *numbers, amateur = setting.split(",") if setting.endswith("base") else [*setting.split(","), None]
    weak = shares.index(min(shares))
    if amateur:
        weak, shares = 2, [shares[0] / sum(shares[:2]), shares[1] / sum(shares[:2]), 0]
    strong = [sum(w * z[v] for w, z in zip(shares, own, strict=True)) for v in range(len(own[0]))]
    return contrasted(strong, own[weak], *(float(n) for n in numbers if n))


def test_contrast_of_a_worked_example():
    config = UltraFuserConfig(
        specialist_names=["a", "b"], specialists=[{"model_type": "llama"}] * 2, fusion="contrast"
    )
    strong, weak = torch.tensor([3, 2.5, 0, -4.0]), torch.tensor([3, 0, -3, -9.0])
    # the first one's weight rounds to 1, so that the mixture is its own
    fused = fusion_class("contrast")(config).fused([strong, weak], torch.tensor([1.0, 0.0]))
    assert fused.tolist() == [3, 3.75, -math.inf, -math.inf]
    assert 3 + math.log(0.1) == pytest.approx(0.6974, abs=1e-4)


def test_dynamic_of_a_worked_example():
    own = [[2.0, 1, 0], [0.0, 2, 0], [0.0, 0, 0]]
    x, moved = shifted(own[0], own[2], own[1])
    assert x == 1.0
    before, after = softmax(own[2]), softmax(own[1])
    assert [divergence(after, before), divergence(before, after)] == pytest.approx([0.4330, 0.4743], abs=1e-4)
    assert moved == pytest.approx([0.2595, 0.7054, 0.0351], abs=1e-4)
    assert dynamic(own).exp().tolist() == pytest.approx(moved, abs=1e-6)


def test_dynamic_of_a_large_model_like_the_base_is_the_tuned_one_and_without_tuning_the_large_one():
    large, tuned, _ = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).tolist()
    torch.testing.assert_close(dynamic([large, tuned, large]), torch.tensor(tuned).log_softmax(-1), **CLOSE)
    torch.testing.assert_close(dynamic([large, tuned, tuned]), torch.tensor(large).log_softmax(-1), **CLOSE)


def dynamic(logits):
    three = {"specialist_names": NAMES, "specialists": [{"model_type": "llama"}] * 3, "gate": "uniform"}
    rule = fusion_class("dynamic:large,base")(UltraFuserConfig(fusion="dynamic:large,base", **three))
    return rule.fused(map(torch.tensor, logits), torch.full((3,), 1 / 3))


@every_rule
@torch.no_grad()
def test_logits_are_those_of_the_formula(models, rule):
    model, ids = fuse(models, rule), prompt()
    out = model(ids)
    expected = by_hand(models, rule, ids, out.gate_weights)
    assert not model.model.fusion_rule.has_loss
    found = out.logits if rule.startswith("contrast") else out.logits.log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.grid
@every_rule
@torch.no_grad()
def test_generate_follows_the_formula_and_batches_and_beams_agree(models, rule):
    model, ids = fuse(models, rule), prompt()
    written = ids
    for _ in range(5):
        weights = model(written, use_cache=False).gate_weights
        written = torch.cat([written, by_hand(models, rule, written, weights)[:, -1:].argmax(-1)], dim=1)
    answer = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert answer.tolist() == written.tolist()
    padded = torch.cat([torch.zeros_like(ids[:1, :3]), ids[:1]], dim=1)
    both = torch.cat([padded, torch.cat([ids[:1], ids[:1, -3:]], dim=1)])
    mask = (torch.arange(both.shape[1]) >= torch.tensor([[3], [0]])).long()
    batch = model.generate(both, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert batch[0, 3:].tolist() == written[0].tolist()
    model.generate(ids, max_new_tokens=3, num_beams=2, do_sample=False)


@torch.no_grad()
def test_one_that_all_weight_is_on_predicts_alone_without_a_contrast(models):
    model, ids = fuse(models, "contrast:0,0.000001"), prompt()
    alone = torch.tensor([[0.0, 1, 0]]).expand(2, -1)
    found, own = model(ids, gate_prior=alone).logits, models["tuned"](ids).logits
    seen = found.isfinite()
    torch.testing.assert_close(found[seen], own[seen], **CLOSE)
    assert torch.equal(seen, own >= own.amax(-1, keepdim=True) + math.log(1e-6))


@torch.no_grad()
def test_an_amateur_that_all_weight_is_on_is_contrasted_with_the_mean_of_the_others(models):
    model, ids = fuse(models, "contrast:0.5,0.1,base"), prompt()
    logits = model(ids, gate_prior=torch.tensor([[0.0, 0, 1]]).expand(2, -1)).logits
    strong = (models["large"](ids).logits + models["tuned"](ids).logits) / 2
    expected = torch.tensor([contrasted(s, w) for s, w in rows_of(strong, models["base"](ids).logits)])
    torch.testing.assert_close(logits.flatten(0, 1), expected, rtol=1e-4, atol=1e-4)


def rows_of(*tensors):
    return zip(*(t.flatten(0, 1).tolist() for t in tensors), strict=True)


@torch.no_grad()
def test_a_gate_that_learned_under_logits_is_read_with_its_temperatures(models, tmp_path):
    learned = fuse(models, "logits", gate="cross", gate_hidden_size=8, gate_calibration=True)
    learned.save_pretrained(tmp_path)
    model, ids = UltraFuserForCausalLM.from_pretrained(tmp_path, fusion="contrast:0.5,0.1"), prompt()
    out, plain = model(ids), learned(ids)
    assert torch.equal(out.gate_weights, plain.gate_weights)
    assert plain.logit_scales.ne(1).all()
    weak = out.gate_weights.argmin(-1)
    own = torch.stack([models[name](ids).logits for name in NAMES])
    amateur = own.gather(0, weak[None, ..., None].expand(1, *own.shape[1:]))[0] * plain.logit_scales
    expected = torch.tensor([contrasted(s, w) for s, w in rows_of(plain.logits, amateur)])
    torch.testing.assert_close(out.logits.flatten(0, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.grid
@every_rule
@torch.no_grad()
def test_a_loaded_model_is_the_saved_one_and_older_code_names_the_version(models, rule, tmp_path, monkeypatch):
    model, ids = fuse(models, rule), prompt()
    model.save_pretrained(tmp_path)
    assert torch.equal(UltraFuserForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["format_version"], written["fusion"]) == (2, rule)
    monkeypatch.setattr(configuration_ultrafuser, "FORMAT_VERSION", 1)
    with pytest.raises(ValueError, match="up to format 1, but this one is in format 2"):
        UltraFuserConfig.from_pretrained(tmp_path)


def test_a_folder_says_what_it_said_and_one_saved_under_another_rule_is_of_format_2(models, tmp_path):
    fuse(models, "logits").save_pretrained(tmp_path / "plain")
    written = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert (written["format_version"], written["fusion"]) == (1, "logits")
    model = UltraFuserForCausalLM.from_pretrained(tmp_path / "plain", fusion="contrast")
    model.save_pretrained(tmp_path / "other")
    assert json.loads((tmp_path / "other" / "config.json").read_text())["format_version"] == 2
    with pytest.raises(Refusal, match="there is no specialist 'small'"):
        UltraFuserForCausalLM.from_pretrained(tmp_path / "plain", fusion="contrast:0.5,0.1,small")
    with pytest.raises(Refusal, match="`gate` is 'mlp'"):
        UltraFuserForCausalLM.from_pretrained(tmp_path / "plain", fusion="dynamic:large,base")


@pytest.mark.grid
@every_rule
@torch.no_grad()
def test_ways_of_decoding_give_the_tokens_of_the_plain_way_or_are_refused(models, rule):
    model, ids = fuse(models, rule), prompt(batch=1, length=9)
    options = {"max_new_tokens": 8, "do_sample": False}
    plain = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, custom_generate=self_draft, **options), plain)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=2, **options), plain)
    with pytest.raises(ValueError, match="Dropping leaves out .* compares all of them. Decode without"):
        check_droppable(model)
    with pytest.raises(ValueError, match="needs fusion='logits'"):
        check_servable(model.config)


@pytest.mark.parametrize("rule", ["contrast", "dynamic:large,base"])
@torch.no_grad()
def test_stacked_and_in_one_paged_cache_tokens_are_those_of_the_plain_way(rule):
    torch.manual_seed(2)
    alike = {name: specialist("llama", layers=1) for name in NAMES}
    model, ids = fuse(alike, rule, attn_implementation="sdpa"), prompt(batch=1, length=9)
    settings = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    plain = model.generate(ids, generation_config=settings)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    (answer,) = model.generate_batch(ids.tolist(), settings, continuous_batching_config=small).values()
    assert answer.generated_tokens == plain[0, 9:].tolist()
    assert torch.equal(stack(model).generate(ids, generation_config=settings), plain)


@torch.no_grad()
def test_adapters_of_one_base_are_contrasted_as_models_are(tmp_path):
    whole, ids = fuse(make(tmp_path), "contrast"), prompt()
    own = {name: whole.specialist(name)(ids).logits for name in whole.config.specialist_names}
    out = whole(ids)
    strong = sum(w[..., None] * z for w, z in zip(out.gate_weights.unbind(-1), own.values(), strict=True))
    amateurs = out.gate_weights.argmin(-1)[None, ..., None].expand(1, *strong.shape)
    weak = torch.stack(list(own.values())).gather(0, amateurs)[0]
    expected = torch.tensor([contrasted(s, w) for s, w in rows_of(strong, weak)])
    torch.testing.assert_close(out.logits.flatten(0, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.grid
@every_rule
def test_what_needs_a_loss_is_refused_with_the_way_out(models, rule, tmp_path):
    model, ids = fuse(models, rule), prompt()
    way_out = r"`fusion` is .* for decoding.*Train and measure .* fusion='logits'.*`from_pretrained\(folder"
    with pytest.raises(Refusal, match=way_out):
        model(ids, labels=ids)
    for trainer in (GateTrainer, JointTrainer):
        with pytest.raises(Refusal, match=way_out):
            build(trainer, model, tmp_path)
    settings, rows = DistilConfig(str(tmp_path), use_cpu=True, bf16=False), Dataset.from_list([{"text": "a"}])
    with pytest.raises(Refusal, match=way_out):
        DistilTrainer(models["tuned"], model, settings, {"text": rows}, processing_class=tokenizer())
    with pytest.raises(Refusal, match=way_out):
        rank_subsets(model, 2, {})


REFUSED = {
    "a strength below 0": ({"fusion": "contrast:-1"}, "contrast takes its strength, at least 0"),
    "an infinite strength": ({"fusion": "contrast:inf"}, "contrast takes its strength"),
    "no number": ({"fusion": "contrast:nan,0.1"}, "contrast takes its strength"),
    "a cut-off of 0": ({"fusion": "contrast:0.5,0"}, "its cut-off, above 0 and up to 1"),
    "a cut-off above 1": ({"fusion": "contrast:0.5,1.5"}, "its cut-off, above 0 and up to 1"),
    "a name first": ({"fusion": "contrast:base"}, "and the amateur's name, as in contrast:0.5,0.1"),
    "no such amateur": ({"fusion": "contrast:0.5,0.1,small"}, r"no specialist 'small'.*Name one of \['large'"),
    "no roles": ({"fusion": "dynamic"}, "dynamic takes the name of the large model"),
    "one role": ({"fusion": "dynamic:large"}, "as in dynamic:large,base. But got 'large'"),
    "one for both": ({"fusion": "dynamic:large,large"}, "as in dynamic:large,base"),
    "no such role": ({"fusion": "dynamic:large,small"}, "Fuse these, three or more, and name the large model"),
    "a gate": ({"fusion": "dynamic:large,base", "gate": "mlp"}, "`gate` is 'mlp'.*would have no effect"),
    "sparse": ({"fusion": "dynamic:large,base", "gate_sparsifier": "top_k:1"}, "'top_k:1'.*would have no effect"),
    "signed": ({"fusion": "contrast", "signed_weights": [1, 1, -1]}, "`fusion` is 'contrast' and `signed_weights`"),
    "a setting of none": ({"fusion": "logits:2"}, "has no setting, but got '2'. Leave it out"),
    "no such rule": ({"fusion": "sum"}, "Unknown fusion 'sum'. Choose one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_rule_cannot_do_is_refused_by_name(case, models):
    choices, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        UltraFuserForCausalLM.from_specialists(models, **{"gate": "uniform"} | choices)


def test_dynamic_refuses_two_specialists_and_a_prior(models):
    with pytest.raises(Refusal, match="Dynamic fusion is of a large model, small ones that were tuned"):
        fuse({name: models[name] for name in ("large", "base")}, "dynamic:large,base")
    with pytest.raises(ValueError, match="`gate_prior` multiplies .* does not read. Leave it out"):
        fuse(models, "dynamic:large,base")(prompt(), gate_prior=torch.ones(2, 3))


def test_what_would_weigh_specialists_without_effect_is_refused(models):
    model = fuse(models, "dynamic:large,base")
    with pytest.raises(ValueError, match="does not read. Let the chosen specialist answer alone"):
        PromptRoute(model, tokenizer(), "perplexity")
    assert PromptRoute(model, tokenizer(), "perplexity", alone=True).alone
    with pytest.raises(ValueError, match="reads none. Leave temperature and bias as they are"):
        next(stream(model, tokenizer(), [{"content": "2+2="}], max_new_tokens=2, temperature=2.0))


def test_one_that_answers_alone_is_itself_and_several_in_one_batch_are_refused(models):
    model, ids = fuse(models, "contrast"), prompt()

    class First(Router):
        def prior(self, prompts):
            return torch.eye(3)[: len(prompts.input_ids)]

    route = PromptRoute(model, tokenizer(), First({}), alone=True)
    answering, options, _ = route(ids[:1])
    assert torch.equal(answering(ids[:1]).logits, models["large"](ids[:1]).logits)
    assert not options
    with pytest.raises(ValueError, match="fusion='contrast' counts the others, too. Ask one prompt at a time"):
        route(ids)


def test_a_specialist_can_be_added_and_the_amateur_not_be_taken_out(models, tmp_path):
    model = fuse(models, "contrast:0.5,0.1,base", gate="constant")
    specialist("llama", layers=1).save_pretrained(tmp_path)
    assert add_specialist(model, "new", tmp_path).config.fusion == "contrast:0.5,0.1,base"
    assert remove_specialist(model, "tuned").config.fusion == "contrast:0.5,0.1,base"
    with pytest.raises(Refusal, match="no specialist 'base'"):
        remove_specialist(model, "base")
