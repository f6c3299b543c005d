"""Gates that read how well each specialist has predicted the text so far: the same weights whichever way a text is read."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, DynamicCache

from modeling_ultrafuser import UltraFuserConfig
from modeling_ultrafuser.evidence_ultrafuser import EvidenceLayer
from modeling_ultrafuser.forecasts_ultrafuser import accumulated
from modeling_ultrafuser.gate_base_ultrafuser import Evidence, Reads
from modeling_ultrafuser.gates_ultrafuser import GATES
from modeling_ultrafuser.serving_ultrafuser import check_servable
from tests.support.adapted import BASES, make, pair
from tests.support.fusions import MIXTURES
from tests.support.mixes import MIXES, fuse, naive_gate_weights, prompt, textbook
from tests.support.tiny import specialist
from ultrafuser.build.specialist_edits import add_specialist, remove_specialist
from ultrafuser.decoding.stacking import stack, unstack
from ultrafuser.evaluation.baselines import ShuffledGate, ensemble
from ultrafuser.evaluation.measurement import cost


READERS = [name for name, gate in GATES.items() if Reads.PAST in gate.reads]


STEPS = 8


# sums of many log-probabilities, which a gate multiplies
NEAR = {"rtol": 1e-3, "atol": 1e-4}


every_reader = pytest.mark.parametrize("gate", READERS)


either_way = pytest.mark.parametrize(("gate", "fusion"), [("evidence", "logits"), ("posterior", "probabilities")])


every_fusion = pytest.mark.parametrize("fusion", MIXTURES)


@pytest.fixture
def specialists():
    return MIXES["one family"]()


def generate(fused, ids, **options):
    return fused.generate(ids, **{"max_new_tokens": STEPS, "do_sample": False} | options)


def padded():
    ids = prompt(length=12)
    mask = torch.ones_like(ids)
    ids[1, :5] = mask[1, :5] = 0
    return ids, mask


# ---------------------------------------------------------------------------------------------- the numbers


def test_sums_and_forecasters_are_the_textbooks():
    wanted = Evidence(decays=(0.5, 0.99), switches=(0.2, 0.002, 0.0))
    log_probs = torch.randn(2, 40, 3, dtype=torch.float64) - 3
    found = accumulated(log_probs, *[torch.ones(2, 40, dtype=torch.bool)] * 2, wanted)
    expected = torch.tensor([textbook(row.exp().tolist(), *wanted)[1:] for row in log_probs], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [1, 8, 9, 16, 17, 50])
def test_a_long_text_that_is_run_in_stretches_is_one_that_is_run_token_by_token(length):
    wanted = Evidence(decays=(0.5, 0.99), switches=(0.2, 0.002, 0.0))
    log_probs = torch.randn(3, length, 4, dtype=torch.float64) * 3 - 6
    follows, counts = torch.rand(3, length) > 0.1, torch.rand(3, length) > 0.2
    whole, before, steps = accumulated(log_probs, follows, counts & follows, wanted), None, []
    for t in range(length):
        part = slice(t, t + 1)
        steps.append(accumulated(log_probs[:, part], follows[:, part], (counts & follows)[:, part], wanted, before))
        before = steps[-1][:, -1]
    torch.testing.assert_close(whole, torch.cat(steps, 1), rtol=1e-10, atol=1e-10)
    # and in single numbers, even where all but one are almost ruled out
    single = accumulated(log_probs.float(), follows, counts & follows, wanted)
    torch.testing.assert_close(single.double(), whole, rtol=1e-4, atol=1e-4)


def test_the_forecaster_is_at_most_log_n_nats_behind_the_best_specialist():
    # the mixture's own guarantee, without switching
    log_probs = torch.randn(4, 60, 3, dtype=torch.float64) - 3
    follows = torch.ones(4, 60, dtype=torch.bool)
    posterior = accumulated(log_probs, follows, follows, Evidence(switches=(0.0,)))[..., 0]
    before = torch.cat([torch.full((4, 1, 3), 1 / 3, dtype=torch.float64).log(), posterior[:, :-1]], 1)
    mixed = (before + log_probs).logsumexp(-1).sum(1)
    assert (mixed >= log_probs.sum(1).max(-1).values - torch.tensor(3.0).log()).all()


def test_nothing_of_an_earlier_text_is_left_where_another_begins():
    wanted, log_probs = Evidence(decays=(0.9,), switches=(0.01,)), torch.randn(1, 9, 2) - 3
    follows = torch.ones(1, 9, dtype=torch.bool)
    follows[0, 4] = False
    found = accumulated(log_probs, follows, follows, wanted)
    alone = accumulated(log_probs[:, 5:], follows[:, 5:], follows[:, 5:], wanted)
    torch.testing.assert_close(found[:, 5:], alone)
    assert torch.equal(found[0, 4], torch.tensor([[0.0, -0.6931472]] * 2))


@pytest.mark.grid
@every_fusion
@every_reader
@pytest.mark.parametrize("mix", ["three families", "soft caps"])
@torch.no_grad()
def test_weights_are_those_of_the_specialists_own_log_probabilities(mix, gate, fusion):
    specialists = MIXES[mix]()
    fused, ids = fuse(specialists, gate=gate, fusion=fusion), prompt(length=30)
    found = fused(ids).gate_weights
    torch.testing.assert_close(found, naive_gate_weights(fused, specialists, ids), **NEAR)
    assert found.std(dim=1).min() > 0.02, "the weights do not move"


@every_reader
@torch.no_grad()
def test_a_token_changes_no_weight_before_it(gate, specialists):
    fused, ids = fuse(specialists, gate=gate), prompt(length=20)
    other = ids.clone()
    other[:, 11:] = (ids[:, 11:] + 7) % 90 + 3
    before, after = fused(ids).gate_weights, fused(other).gate_weights
    assert torch.equal(before[:, :11], after[:, :11])
    # the token itself tells how likely it was
    assert not torch.allclose(before[:, 11], after[:, 11], atol=1e-3)


@pytest.mark.e2e
@torch.no_grad()
def test_the_setting_says_how_soon_another_specialist_is_believed(specialists):
    ids = prompt(length=30)
    for fusion, default in (("logits", 1e-6), ("probabilities", 0.0005)):
        found = fuse(specialists, gate="posterior", fusion=fusion)(ids).gate_weights
        same = fuse(specialists, gate="posterior", fusion=fusion, gate_switch_probability=default)
        assert torch.equal(same(ids).gate_weights, found)
    sooner = fuse(specialists, gate="posterior", gate_switch_probability=0.5)(ids).gate_weights
    # half of all weight is dealt out evenly at every token
    assert sooner.min() >= 0.5 / 3 - 1e-6
    for wrong in (1.0, -0.1, "often", True):
        with pytest.raises(ValueError, match="`gate_switch_probability`"):
            UltraFuserConfig(gate="posterior", gate_switch_probability=wrong)


# ---------------------------------------------------------------------------------------------- other ways to run


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return make(tmp_path_factory.mktemp("adapters"))


@pytest.mark.e2e
@either_way
def test_adapters_of_one_base_are_weighed_as_models_of_their_own_are(gate, fusion, adapters):
    adapted, merged = pair(adapters, gate=gate, fusion=fusion)
    ids = prompt(length=12)
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).gate_weights, merged(ids).gate_weights, **NEAR)
    expected = generate(adapted, ids, use_cache=False)
    assert torch.equal(generate(adapted, ids), expected)
    assert torch.equal(generate(adapted, ids, cache_implementation="static"), expected)
    assert torch.equal(generate(adapted, ids, num_beams=3), generate(adapted, ids, num_beams=3, use_cache=False))


@either_way
def test_stacked_specialists_are_weighed_alike(gate, fusion):
    model = fuse({name: specialist() for name in ("text", "code", "math")}, gate=gate, fusion=fusion)
    stacked, (ids, mask) = stack(copy.deepcopy(model)), padded()
    with torch.no_grad():
        inputs = {"attention_mask": mask}
        found, expected = (m(ids, **inputs).gate_weights for m in (stacked, model))
        torch.testing.assert_close(found[mask == 1], expected[mask == 1], **NEAR)
        again = unstack(stacked)(ids, **inputs)
        assert torch.equal(again.gate_weights, expected)
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 3}):
        expected = generate(model, ids, **inputs, **options)
        assert torch.equal(generate(stacked, ids, **inputs, **options), expected)


@torch.no_grad()
def test_a_copy_asks_its_own_head_and_a_new_head_is_asked(specialists):
    fused, ids = fuse(specialists, gate="posterior"), prompt()
    before, twin = fused(ids).gate_weights, copy.deepcopy(fused)
    twin.lm_head.weight.zero_()
    torch.testing.assert_close(twin(ids).gate_weights, torch.full((2, 9, 3), 1 / 3))
    assert torch.equal(fused(ids).gate_weights, before)
    fused.lm_head = nn.Linear(*reversed(fused.lm_head.weight.shape), bias=False)
    assert not torch.allclose(fused(ids).gate_weights, before, atol=1e-2)
    assert "model.wide_head" not in dict(fused.named_modules())
    assert sum("lm_head" in name for name in fused.state_dict()) == 1


READ = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    kept = torch.load(folder + "/kept.pt")
    with torch.no_grad():
        outputs = model(kept["ids"])
    assert torch.equal(outputs.gate_weights, kept["gate_weights"]) and torch.equal(outputs.logits, kept["logits"])
    model.generation_config.eos_token_id = None
    assert torch.equal(model.generate(kept["ids"], max_new_tokens=8, do_sample=False), kept["text"])
assert "modeling_ultrafuser" not in sys.modules
"""


@pytest.mark.process
def test_saved_models_say_the_same_where_this_package_is_not_installed(specialists, tmp_path):
    for gate in READERS:
        fused, ids = fuse(specialists, gate=gate, fusion="probabilities"), prompt()
        with torch.no_grad():
            outputs = fused(ids)
        fused.save_pretrained(tmp_path / gate)
        kept = {"ids": ids, "gate_weights": outputs.gate_weights, "logits": outputs.logits}
        torch.save(kept | {"text": generate(fused, ids)}, tmp_path / gate / "kept.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", READ, *(str(tmp_path / gate) for gate in READERS)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


# ---------------------------------------------------------------------------------------------- more specialists, fewer


@every_reader
def test_adapters_of_a_base_whose_layers_all_have_windows_find_their_masks(gate, tmp_path, monkeypatch):
    # evidence behind the layers has no window, and is none of the base's
    monkeypatch.setitem(BASES, "windows", lambda: specialist("mistral", sliding_window=4))
    adapted, _ = pair(make(tmp_path, "windows"), gate=gate)
    ids = prompt(length=12)
    assert torch.equal(generate(adapted, ids), generate(adapted, ids, use_cache=False))


@every_fusion
@torch.no_grad()
def test_a_newcomer_to_a_posterior_needs_no_training(fusion, specialists, tmp_path):
    newcomer, ids = specialist(layers=1, hidden_size=24), prompt(length=20)
    newcomer.save_pretrained(tmp_path)
    fused = fuse(specialists, gate="posterior", fusion=fusion)
    larger = add_specialist(fused, "law", tmp_path)
    expected = naive_gate_weights(larger, {**specialists, "law": newcomer}, ids)
    torch.testing.assert_close(larger(ids).gate_weights, expected, **NEAR)
    smaller = remove_specialist(larger, "code")
    rest = {"text": specialists["text"], "math": specialists["math"], "law": newcomer}
    torch.testing.assert_close(smaller(ids).gate_weights, naive_gate_weights(smaller, rest, ids), **NEAR)


@pytest.mark.e2e
@torch.no_grad()
def test_others_columns_of_evidence_stay(specialists, tmp_path):
    specialist(layers=1).save_pretrained(tmp_path)
    gate = fuse(specialists, gate="evidence").model.fusion_gate
    larger = add_specialist(fuse(specialists, gate="evidence"), "law", tmp_path).model.fusion_gate
    assert larger.skip_evidence_weight.shape == (4, 4, 9)
    assert (larger.skip_evidence_weight[3] == 0).all()
    model = fuse(specialists, gate="evidence", fusion="probabilities", gate_calibration=True)
    gate = model.model.fusion_gate
    smaller = remove_specialist(model, "code").model.fusion_gate
    assert torch.equal(smaller.skip_evidence_weight, gate.skip_evidence_weight[[0, 2, 3, 5]][:, [0, 2]])
    assert torch.equal(smaller.hidden_evidence_weight, gate.hidden_evidence_weight[:, [0, 2]])


# ---------------------------------------------------------------------------------------------- refusals


@every_reader
def test_what_has_no_place_for_a_state_or_no_heads_refuses_in_words(gate, specialists, tmp_path):
    fused = fuse(specialists, gate=gate)
    alike = UltraFuserConfig(specialist_names=["a", "b"], specialists=[specialist().config] * 2, gate=gate)
    check_servable(alike)
    with pytest.raises(ValueError, match=f"Continuous batching keeps keys and values .* gate='{gate}'"):
        fused.generate_batch([[5, 6, 7]], max_new_tokens=2)
    offloaded = DynamicCache(config=fused.config)
    offloaded.offloading = True
    with pytest.raises(ValueError, match="An offloaded cache fetches one layer after another"):
        fused(prompt(), past_key_values=offloaded)
    fused.save_pretrained(tmp_path)
    backbone = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    with pytest.raises(ValueError, match="the backbone alone has none: load the folder with `AutoModelForCausalLM`"):
        backbone(prompt())
    with pytest.raises(ValueError, match="has another head in their place"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True)
    fused.lm_head.weight = nn.Parameter(fused.lm_head.weight[:50])
    with pytest.raises(ValueError, match="each process holds a part of it"):
        fused(prompt())


@every_reader
@torch.no_grad()
def test_a_model_that_looks_back_is_compared_with_controls_of_its_own(gate, specialists):
    fused, ids = fuse(specialists, gate=gate), prompt(length=12)
    shuffled = ensemble(fused, ShuffledGate(fused.config, fused.model.fusion_gate))
    found, dealt = fused(ids).gate_weights, shuffled(ids).gate_weights
    torch.testing.assert_close(dealt.sort(1).values, found.sort(1).values)
    uniform = ensemble(fused, "uniform")
    assert torch.equal(uniform(ids).gate_weights, torch.full((2, 12, 3), 1 / 3))
    costs = [cost(model, model, ids[:1], new_tokens=2, repeats=1) for model in (fused, uniform)]
    assert costs[0]["cache_bytes_per_token"] == costs[1]["cache_bytes_per_token"]


def test_the_past_of_other_gates_is_nothing(specialists):
    fused, ids = fuse(specialists, gate="cross"), prompt()
    cache = fused(ids, use_cache=True).past_key_values
    assert len(cache.layers) == fused.config.num_hidden_layers
    assert not any(isinstance(layer, EvidenceLayer) for layer in cache.layers)
