"""The "anchor" gate: what the "linear" gate makes of one specialist's state, and nothing without that specialist."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM, configuration_ultrafuser
from modeling_ultrafuser.gates_ultrafuser import gate_settings, gate_word
from modeling_ultrafuser.refusals_ultrafuser import Refusal
from tests.support.fusions import MIXTURES
from tests.support.mixes import MIXES, fuse, prompt
from tests.support.tiny import specialist
from ultrafuser.build.specialist_edits import add_specialist, remove_specialist
from ultrafuser.decoding.dropping import drop_specialists


WIDTHS = {"text": 32, "code": 32, "math": 48}


@pytest.fixture
def models():
    return MIXES["one family"]()


def linear_twin(models, fused):
    """A "linear" gate with the anchor's columns, and zeros in all others."""
    calibration = "+calibration" * fused.config.gate_calibration
    twin = fuse(models, gate=f"linear{calibration}", fusion=fused.config.fusion)
    first = sum(width for name, width in list(WIDTHS.items())[: fused.model.fusion_gate.anchor])
    with torch.no_grad():
        twin.model.fusion_gate.weight.zero_()
        own = fused.model.fusion_gate.weight
        twin.model.fusion_gate.weight[:, first : first + own.shape[1]] = own
        twin.model.fusion_gate.bias.copy_(fused.model.fusion_gate.bias)
    return twin


@pytest.mark.parametrize("fusion", MIXTURES)
@pytest.mark.parametrize("gate", ["anchor:text", "anchor:code+calibration", "anchor:math"])
@torch.no_grad()
def test_it_is_the_linear_gate_whose_other_columns_are_zero(gate, fusion, models):
    fused, ids = fuse(models, gate=gate, fusion=fusion), prompt()
    twin = linear_twin(models, fused)
    weights = fused.gate_weights(ids)
    assert weights.std(1).min() > 0.01
    torch.testing.assert_close(weights, twin.gate_weights(ids))
    torch.testing.assert_close(fused(ids).logits, twin(ids).logits)


@torch.no_grad()
def test_a_score_is_a_row_times_the_anchors_state_and_a_bias(models):
    fused, ids = fuse(models, gate="anchor:code", gate_temperature=1.0), prompt(batch=1, length=4)
    states, gate = fused.specialist("code").model(ids).last_hidden_state, fused.model.fusion_gate
    for t in range(4):
        scores = [sum(w * h for w, h in zip(row, states[0, t], strict=True)) for row in gate.weight]
        expected = torch.stack([s + b for s, b in zip(scores, gate.bias, strict=True)]).softmax(0)
        torch.testing.assert_close(fused.gate_weights(ids)[0, t], expected)


def test_the_anchor_stays_and_the_others_may_go_and_come(models, tmp_path):
    fused, ids = fuse(models, gate="anchor:code"), prompt()
    with pytest.raises(Refusal, match="'code' is the specialist whose hidden state the gate reads. .*Keep it"):
        remove_specialist(fused, "code")
    old = fused.gate_weights(ids)
    # the anchor's index moves from 1 to 0
    smaller = remove_specialist(fused, "text")
    torch.testing.assert_close(smaller.gate_weights(ids), old[..., 1:] / old[..., 1:].sum(-1, keepdim=True))
    specialist(layers=1).save_pretrained(tmp_path)
    larger = add_specialist(fused, "law", tmp_path)
    assert gate_word(larger.config) == "anchor:code"
    new = larger.gate_weights(ids)
    torch.testing.assert_close(new[..., :3], old * (1 - new[..., 3:]))


def test_none_and_an_unknown_one_are_refused_before_weights_are_read(models):
    nowhere = {"text": "/nowhere", "code": "/nowhere"}
    for word in ("anchor", "anchor:", "anchor+calibration"):
        with pytest.raises(ValueError, match=r"\['anchor'\] must name a specialist, as in anchor:text"):
            UltraFuserForCausalLM.from_specialists(nowhere, gate=word)
    with pytest.raises(Refusal, match="there is no specialist 'law'. .*Name one of .*, as in anchor:text"):
        fuse(models, gate="anchor:law")
    plain = fuse(models)
    plain.config.gate = "anchor"
    with pytest.raises(Refusal, match="there is no specialist None"):
        UltraFuserConfig.from_dict(plain.config.to_dict())


def test_a_word_is_read_and_written():
    for word in ("anchor:code", "anchor:code+calibration", "mlp:64", "linear+calibration", "uniform"):
        assert gate_word(UltraFuserConfig(**gate_settings(word))) == word


@torch.no_grad()
def test_a_loaded_model_is_the_saved_one_and_older_code_refuses_its_folder(models, tmp_path, monkeypatch):
    fused, ids = fuse(models, gate="anchor:math"), prompt()
    fused.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, fused(ids).logits)
    written = json.loads((tmp_path / "config.json").read_text())
    assert [written[field] for field in ("format_version", "gate", "gate_anchor")] == [2, "anchor", "math"]
    monkeypatch.setattr(configuration_ultrafuser, "FORMAT_VERSION", 1)
    with pytest.raises(ValueError, match="up to format 1, but this one is in format 2"):
        UltraFuserConfig.from_pretrained(tmp_path)


def test_other_folders_say_nothing_of_an_anchor(models):
    written = fuse(models).config.to_dict()
    assert written["format_version"] == 1
    assert "gate_anchor" not in written


@pytest.mark.parametrize("anchor", ["text", "math"])
def test_while_the_anchor_is_dropped_its_state_is_held_as_the_linear_gate_holds_it(anchor, models):
    fused, ids = fuse(models, gate=f"anchor:{anchor}", gate_temperature=1.0), prompt(batch=1)
    twin = linear_twin(models, fused)
    twin.model.fusion_gate.temperature = 1.0
    for keep in ("top_k:1", "top_k:2"):
        options = {
            "max_new_tokens": 9,
            "do_sample": False,
            "custom_generate": drop_specialists,
            "keep": keep,
            "every": 4,
        }
        assert torch.equal(fused.generate(ids, **options), twin.generate(ids, **options))
