"""Gates that also predict temperatures: factors on the logits, beside shares that still sum to 1."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM
from modeling_ultrafuser.gate_base_ultrafuser import Reads
from tests.support.adapted import make, pair
from tests.support.conversations import weights
from tests.support.fusions import MIXTURES
from tests.support.mixes import MIXES, fuse, prompt
from tests.support.stages import build, logs
from tests.support.tiny import GATE_WORDS, specialist
from trainers import GateTrainer
from trainers.gate_cache import CachedGateTrainer
from ultrafuser.build.specialist_edits import add_specialist, remove_specialist
from ultrafuser.decoding.stacking import stack


ABLE = [word for word, gate in GATE_WORDS.items() if gate.can_calibrate]


def calibrated(gate="cross", fusion="logits", specialists=None):
    model = fuse(specialists or MIXES["one family"](), gate=gate, fusion=fusion, gate_calibration=True)
    temper(model)
    return model


@torch.no_grad()
def temper(model):
    """Keeps the scales of a stirred gate within their bounds."""
    for parameter in model.model.fusion_gate.parameters():
        if len(parameter) == model.model.fusion_gate.num_outputs:
            parameter[model.model.fusion_gate.num_specialists :] *= 0.02


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return make(tmp_path_factory.mktemp("adapters"))


@pytest.mark.grid
@pytest.mark.parametrize("fusion", MIXTURES)
@pytest.mark.parametrize("gate", ABLE)
@torch.no_grad()
def test_logits_are_the_weighed_sum_times_the_scales(gate, fusion):
    specialists, ids = MIXES["one family"](), prompt()
    outputs = calibrated(gate, fusion, specialists)(ids)
    assert outputs.logit_scales.shape == (2, 9, 1 if fusion == "logits" else 3)
    assert (outputs.logit_scales - 1).abs().mean() > 1e-2, "the scales are not stirred"
    torch.testing.assert_close(outputs.gate_weights.sum(-1), torch.ones(2, 9))
    alone = [model(ids).logits for model in specialists.values()]
    shares, scales = outputs.gate_weights.split(1, -1), outputs.logit_scales.expand(-1, -1, 3).split(1, -1)
    parts = list(zip(shares, scales, alone, strict=True))
    if fusion == "logits":
        expected = sum(w * s * z for w, s, z in parts)
    else:
        expected = sum(w * (s * z).softmax(-1) for w, s, z in parts).log()
    torch.testing.assert_close(outputs.logits, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("fusion", MIXTURES)
@torch.no_grad()
def test_a_new_gate_changes_no_logit(fusion):
    ids, specialists = prompt(), MIXES["one family"]()
    plain, new = (
        UltraFuserForCausalLM.from_specialists(specialists, gate="cross", fusion=fusion, gate_calibration=c)
        for c in (False, True)
    )
    assert torch.equal(new(ids).logits, plain(ids).logits)
    assert torch.equal(new(ids).logit_scales, torch.ones_like(new(ids).logit_scales))
    assert plain(ids).logit_scales is None


@pytest.mark.grid
@pytest.mark.parametrize("fusion", MIXTURES)
@pytest.mark.parametrize("gate", ABLE)
@torch.no_grad()
def test_cached_stacked_and_reloaded_models_predict_the_same(gate, fusion, tmp_path):
    specialists = {name: specialist() for name in ("text", "code", "math")}
    model, ids = calibrated(gate, fusion, specialists), prompt()
    logits, cache = model(ids).logits, None
    for part in ids.split(4, dim=1):
        outputs = model(part, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
    torch.testing.assert_close(outputs.logits[:, -1], logits[:, -1], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(stack(copy.deepcopy(model))(ids).logits, logits, rtol=1e-4, atol=2e-5)
    greedy = {"max_new_tokens": 8, "do_sample": False}
    one = ids[:1]
    assisted = model.generate(one, **greedy, assistant_model=model.specialist("code"))
    assert assisted.equal(model.generate(one, **greedy))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(again(ids).logits, logits)


@pytest.mark.grid
@pytest.mark.parametrize("gate", ABLE)
@torch.no_grad()
def test_adapters_of_one_base_are_scaled_as_models_of_their_own_are(gate, adapters):
    adapted, merged = pair(adapters, gate=gate, gate_calibration=True)
    temper(adapted), temper(merged)
    ids = prompt()
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=2e-5)
    assert adapted(ids).logit_scales.shape == (2, 9, 1)


@pytest.mark.grid
@pytest.mark.parametrize("fusion", MIXTURES)
@pytest.mark.parametrize("gate", ABLE)
def test_a_stage_moves_the_scales_as_the_models_own_loss_does_and_so_does_one_from_a_cache(gate, fusion, tmp_path):
    specialists = {name: specialist(layers=1) for name in ("text", "code", "math")}
    plain = calibrated(gate, fusion, specialists)
    twin, before = copy.deepcopy(plain), weights(plain)
    settings = {"optim": "sgd", "learning_rate": 0.1}
    one = build(GateTrainer, plain, tmp_path / "plain", **settings)
    batch = next(iter(one.get_train_dataloader()))
    loss = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    torch.testing.assert_close(one.compute_loss(plain, dict(batch)), loss, rtol=1e-5, atol=1e-5)
    parameters = list(plain.model.fusion_gate.parameters())
    expected = torch.autograd.grad(loss, parameters)
    got = torch.autograd.grad(one.compute_loss(plain, dict(batch)), parameters)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    two = build(CachedGateTrainer, twin, tmp_path / "cached", cached={"cache": tmp_path / "cache"}, **settings)
    one.train(), two.train()
    assert two.keep == "hidden"
    for step, cached in zip(logs(one), logs(two), strict=True):
        assert cached["loss"] == pytest.approx(step["loss"], abs=1e-5)
    torch.testing.assert_close(weights(two.fused), weights(one.fused), rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(before[n], t) for n, t in weights(plain).items() if "fusion_gate" in n)


@pytest.mark.grid
@pytest.mark.parametrize("fusion", MIXTURES)
@pytest.mark.parametrize("gate", [gate for gate in ABLE if Reads.PAST not in GATE_WORDS[gate].reads])
@torch.no_grad()
def test_scales_stay_when_a_specialist_is_added_and_removed(gate, fusion, tmp_path):
    model, ids = calibrated(gate, fusion, {name: specialist() for name in ("text", "code", "math")}), prompt()
    specialist(layers=1, hidden_size=24).save_pretrained(tmp_path)
    larger = add_specialist(model, "law", tmp_path)
    before, after = model(ids), larger(ids)
    kept = before.logit_scales.shape[-1]
    torch.testing.assert_close(after.logit_scales[..., :kept], before.logit_scales)
    assert (after.logit_scales[..., kept:] == 1).all()
    torch.testing.assert_close(after.gate_weights[..., :3], before.gate_weights * (1 - after.gate_weights[..., 3:]))
    again = remove_specialist(larger, "law")
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    # the second one's rows go, not the last one's
    smaller = remove_specialist(model, "code").model.fusion_gate
    if gate == "constant":
        rows = [0, 2, 3] if fusion == "logits" else [0, 2, 3, 5]
        assert torch.equal(smaller.logits, model.model.fusion_gate.logits[rows])


def test_a_gate_that_predicts_no_temperatures_and_a_choice_that_is_none_are_refused():
    with pytest.raises(
        ValueError, match=r"'mlp' predicts no temperatures.*'cross', 'evidence', 'linear', 'anchor', 'constant'"
    ):
        UltraFuserConfig(gate="mlp", gate_calibration=True)
    with pytest.raises(ValueError, match="`gate_calibration` is 'yes'"):
        UltraFuserConfig(gate="cross", gate_calibration="yes")
