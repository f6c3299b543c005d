"""Gates that read how well each specialist has predicted the text so far: the same weights whichever way a text is read."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, DynamicCache, set_seed

from modeling_ultrafuser import UltraFuserConfig
from modeling_ultrafuser.evidence_ultrafuser import KEPT, EvidenceLayer, accumulated
from modeling_ultrafuser.gate_base_ultrafuser import Evidence
from modeling_ultrafuser.gates_ultrafuser import GATES
from modeling_ultrafuser.serving_ultrafuser import check_servable_by_vllm
from tests.support.adapted import BASES, make, pair
from tests.support.conversations import changed, sft_trainer, weights
from tests.support.mixes import MIXES, fuse, naive_gate_weights, naive_greedy, prompt, textbook
from tests.support.stages import build, logs
from tests.support.tiny import specialist
from trainers import GateTrainer, JointTrainer
from trainers.gate_cache import CachedGateTrainer
from ultrafuser.build.specialist_edits import add_specialist, remove_specialist
from ultrafuser.decoding.drafting import self_draft
from ultrafuser.decoding.stacking import stack, unstack
from ultrafuser.evaluation.baselines import ShuffledGate, ensemble
from ultrafuser.evaluation.measurement import cost


READERS = [name for name, gate in GATES.items() if gate.reads_past]
FUSIONS = ["logits", "probabilities"]
STEPS = 8
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
# sums of many log-probabilities, which a gate multiplies
NEAR = {"rtol": 1e-3, "atol": 1e-4}
every_reader = pytest.mark.parametrize("gate", READERS)
either_way = pytest.mark.parametrize(("gate", "fusion"), [("evidence", "logits"), ("posterior", "probabilities")])
every_fusion = pytest.mark.parametrize("fusion", FUSIONS)


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


# ---------------------------------------------------------------------------------------------- generation


@either_way
@pytest.mark.parametrize("mix", ["one family", "windows"])
def test_every_kind_of_cache_and_none_give_the_naive_tokens(mix, gate, fusion):
    specialists = MIXES[mix]()
    fused, ids = fuse(specialists, gate=gate, fusion=fusion), prompt(length=12)
    expected = naive_greedy(fused, specialists, ids, STEPS)
    assert torch.equal(generate(fused, ids, use_cache=False), expected)
    assert torch.equal(generate(fused, ids), expected)
    assert torch.equal(generate(fused, ids, cache_implementation="static"), expected)
    assert torch.equal(generate(fused, ids, past_key_values=DynamicCache()), expected)
    assert torch.equal(generate(fused, ids, prefill_chunk_size=5), expected)
    assert torch.equal(generate(fused, ids, prefill_chunk_size=5, cache_implementation="static"), expected)


@every_reader
@torch.no_grad()
def test_a_text_read_in_parts_has_the_weights_of_one_read_whole(gate, specialists):
    fused, ids = fuse(specialists, gate=gate), prompt(length=30)
    whole, cache, parts = fused(ids), None, []
    for part in ids.split([1, 7, 1, 1, 12, 8], dim=1):
        outputs = fused(part, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        parts.append(outputs)
    torch.testing.assert_close(torch.cat([o.gate_weights for o in parts], 1), whole.gate_weights, **CLOSE)
    torch.testing.assert_close(torch.cat([o.logits for o in parts], 1), whole.logits, **NEAR)


@pytest.mark.parametrize(
    ("gate", "fusion", "calibrated"),
    [
        ("evidence", "logits", False),
        ("evidence", "logits", True),
        ("evidence", "probabilities", True),
        ("posterior", "probabilities", False),
    ],
)
@pytest.mark.parametrize("mix", ["one family", "soft caps"])
@torch.no_grad()
def test_a_step_that_computes_each_specialists_logits_once_says_what_a_whole_pass_says(mix, gate, fusion, calibrated):
    # what the last logits of a step sum up to is what the next step asks for
    fused, ids = fuse(MIXES[mix](), gate=gate, fusion=fusion, gate_calibration=calibrated), prompt(length=20)
    if calibrated:
        fused.model.fusion_gate.skip_evidence_weight *= 0.1
    whole, cache = fused(ids), None
    for end, part in zip((9, *range(10, 21)), ids.split([9, *[1] * 11], dim=1), strict=True):
        outputs = fused(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = outputs.past_key_values
        assert cache.layers[-1].normalised
        torch.testing.assert_close(outputs.logits[:, 0], whole.logits[:, end - 1], **NEAR)
        torch.testing.assert_close(outputs.gate_weights[:, -1], whole.gate_weights[:, end - 1], **NEAR)
    if not any(cache.is_sliding):
        # once it has gone back, what is kept is of another token
        cache.crop(-1)
        outputs = fused(ids[:, -1:], past_key_values=cache, logits_to_keep=1)
        torch.testing.assert_close(outputs.gate_weights[:, -1], whole.gate_weights[:, -1], **NEAR)


@every_reader
@pytest.mark.parametrize("cache", [None, "static"])
def test_a_row_padded_on_the_left_gets_what_it_gets_alone(cache, gate, specialists):
    fused, (ids, mask) = fuse(specialists, gate=gate), padded()
    batch = generate(fused, ids, attention_mask=mask, cache_implementation=cache)
    assert torch.equal(batch[:1], generate(fused, ids[:1]))
    assert torch.equal(batch[1:, 5:], generate(fused, ids[1:, 5:]))


@every_reader
@torch.no_grad()
def test_padding_is_no_evidence_on_either_side(gate, specialists):
    fused, (ids, mask) = fuse(specialists, gate=gate), padded()
    alone = fused(ids[1:, 5:]).gate_weights
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for given in ({}, {"position_ids": positions}):
        torch.testing.assert_close(fused(ids, attention_mask=mask, **given).gate_weights[1:, 5:], alone, **CLOSE)
    right, shown = ids.roll(-5, dims=1), mask.roll(-5, dims=1)
    torch.testing.assert_close(fused(right, attention_mask=shown).gate_weights[1:, :7], alone, **CLOSE)
    # positions that count padding, too: the mask alone tells
    outputs = fused(ids, attention_mask=mask, position_ids=torch.arange(12)[None])
    assert torch.equal(
        outputs.gate_weights[1, 4].argsort(), fused(ids, attention_mask=mask).gate_weights[1, 4].argsort()
    )


@every_reader
def test_beams_find_the_same_with_every_kind_of_cache(gate, specialists):
    fused, (ids, mask) = fuse(specialists, gate=gate), padded()
    options = {"attention_mask": mask, "num_beams": 3, "num_return_sequences": 2}
    expected = generate(fused, ids, use_cache=False, **options)
    assert torch.equal(generate(fused, ids, **options), expected)
    assert torch.equal(generate(fused, ids, cache_implementation="static", **options), expected)


@every_reader
def test_sampling_does_not_depend_on_the_cache(gate, specialists):
    fused, ids, draws = fuse(specialists, gate=gate), prompt(), []
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        set_seed(2)
        draws.append(generate(fused, ids, do_sample=True, num_return_sequences=3, **options))
    assert len(draws[0].unique(dim=0)) > 2
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


@either_way
def test_drafts_of_every_kind_change_no_token(gate, fusion, specialists):
    fused, ids = fuse(specialists, gate=gate, fusion=fusion), prompt(batch=1, length=6).repeat(1, 2)
    greedy = {"max_new_tokens": 24}
    expected = generate(fused, ids, **greedy)
    for name in fused.config.specialist_names:
        assert torch.equal(generate(fused, ids, assistant_model=fused.specialist(name), **greedy), expected)
    assert torch.equal(generate(fused, ids, prompt_lookup_num_tokens=3, **greedy), expected)
    for drafts in (4, 30):
        assert torch.equal(generate(fused, ids, custom_generate=self_draft, num_drafts=drafts, **greedy), expected)


@every_reader
def test_self_drafting_sees_no_padding(gate, specialists):
    fused, (ids, mask) = fuse(specialists, gate=gate), padded()
    drafted = generate(fused, ids, attention_mask=mask, custom_generate=self_draft)
    assert torch.equal(drafted, generate(fused, ids, attention_mask=mask))


@every_reader
def test_a_fused_model_drafts_for_another(gate, specialists):
    # its own cache goes back over several steps of one token each
    other, ids = specialist(layers=3), prompt(batch=1)
    other.generation_config.eos_token_id = None
    expected = other.generate(ids, max_new_tokens=24, do_sample=False)
    drafter = fuse({"text": copy.deepcopy(other), "code": specialist(layers=1)}, gate=gate)
    assert torch.equal(other.generate(ids, max_new_tokens=24, do_sample=False, assistant_model=drafter), expected)


@every_reader
def test_a_conversation_goes_on_from_its_cache(gate, specialists):
    fused = fuse(specialists, gate=gate)
    first = generate(fused, prompt(batch=1), return_dict_in_generate=True)
    longer = torch.cat([first.sequences, prompt(batch=1, length=5)], dim=-1)
    kept = copy.deepcopy(first.past_key_values)
    expected = generate(fused, longer, use_cache=False)
    assert torch.equal(generate(fused, longer, past_key_values=first.past_key_values), expected)
    assert torch.equal(generate(fused, longer, past_key_values=kept, custom_generate=self_draft), expected)


@every_reader
@torch.no_grad()
def test_a_cache_that_was_cropped_goes_on_as_one_that_read_less(gate, specialists):
    fused, ids = fuse(specialists, gate=gate), prompt(length=20)
    cache = fused(ids, use_cache=True).past_key_values
    cache.crop(-8)
    # several steps of one token, and one of many
    for token in ids[:, 12:16].split(1, dim=1):
        fused(token, past_key_values=cache, logits_to_keep=1)
    cache.crop(-3)
    found = fused(ids[:, 13:], past_key_values=cache).gate_weights
    torch.testing.assert_close(found, fused(ids).gate_weights[:, 13:], **CLOSE)


@torch.no_grad()
def test_a_cache_that_was_cropped_to_nothing_begins_anew(specialists):
    fused, ids = fuse(specialists, gate="posterior"), prompt(length=20)
    cache = fused(ids, use_cache=True).past_key_values
    fused(ids[:, :2], past_key_values=cache)
    cache.crop(-22)
    torch.testing.assert_close(fused(ids, past_key_values=cache).gate_weights, fused(ids).gate_weights, **CLOSE)


@torch.no_grad()
def test_a_cache_keeps_the_last_tokens_alone_and_says_so_when_it_cannot_go_back(specialists):
    fused, ids = fuse(specialists, gate="posterior"), prompt(length=KEPT + 20)
    cache = fused(ids, use_cache=True).past_key_values
    for token in prompt(length=3).split(1, dim=1):
        fused(token, past_key_values=cache)
    (layer,) = (layer for layer in cache.layers if isinstance(layer, EvidenceLayer))
    assert [t.shape[:2] for t in layer.past] == [(2, KEPT)] * 3
    with pytest.raises(ValueError, match=f"goes back {KEPT - 1} tokens here, but the cache is to be cropped by -70"):
        cache.crop(-70)


# ---------------------------------------------------------------------------------------------- texts side by side


@every_reader
@torch.no_grad()
def test_texts_that_lie_end_to_end_know_nothing_of_each_other(gate, specialists):
    fused, one, two = fuse(specialists, gate=gate), prompt(batch=1, length=9), prompt(batch=1, length=6)
    row = torch.cat([one, two], dim=1)
    expected = torch.cat([fused(one).gate_weights, fused(two).gate_weights], 1)
    positions = torch.cat([torch.arange(9), torch.arange(6)])[None]
    # with a cache, the library's attention would see across
    found = fused(row, position_ids=positions, use_cache=False).gate_weights
    torch.testing.assert_close(found, expected, **CLOSE)
    whole = fused(row).gate_weights
    assert torch.equal(whole[:, :9].argmax(-1), expected[:, :9].argmax(-1))
    assert not torch.allclose(whole[:, 9:], expected[:, 9:], atol=1e-3)


def views():
    """One prompt in three specialists' words, of different length, that all end alike. (batch, specialists, seq)"""
    ids = prompt(batch=6, length=12).view(2, 3, 12)
    masks = torch.ones_like(ids)
    ids[:, :, 8:] = ids[:, :1, 8:]
    for row, lengths in enumerate([(0, 2, 5), (4, 0, 1)]):
        for k, padding in enumerate(lengths):
            ids[row, k, :padding] = masks[row, k, :padding] = 0
    return ids, masks


@every_reader
@torch.no_grad()
def test_of_a_prompt_in_everyones_own_words_the_tokens_count_that_all_read(gate, specialists):
    fused, (ids, masks) = fuse(specialists, gate=gate), views()
    own = {"specialist_input_ids": ids, "specialist_attention_mask": masks}
    found = fused(ids[:, 0], attention_mask=masks[:, 0], **own).gate_weights
    for row in range(2):
        states, likelihoods = [], []
        for k, model in enumerate(specialists.values()):
            text = ids[row, k, masks[row, k] == 1][None]
            states.append(model.base_model(text).last_hidden_state[:, -4:])
            p = model(text).logits.softmax(-1)[:, -5:-1]
            likelihoods.append(p.gather(-1, text[:, -4:, None])[0])
        evidence = textbook(torch.cat(likelihoods, -1).tolist(), *fused.model.fusion_gate.evidence)[1:]
        expected = fused.model.fusion_gate(states, torch.tensor([evidence])).weights
        same = (ids[row] == ids[row, :1]).all(0)[8:]
        assert same.all()
        torch.testing.assert_close(found[row : row + 1, 8:], expected, **NEAR)


@every_reader
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}])
def test_every_specialist_continues_its_own_view(options, gate, specialists):
    fused, (ids, masks) = fuse(specialists, gate=gate), views()
    own = {"specialist_input_ids": ids, "specialist_attention_mask": masks, "attention_mask": masks[:, 0]}
    expected = generate(fused, ids[:, 0], use_cache=False, **own)
    assert torch.equal(generate(fused, ids[:, 0], **own, **options), expected)


# ---------------------------------------------------------------------------------------------- other ways to run


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return make(tmp_path_factory.mktemp("adapters"))


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


# ---------------------------------------------------------------------------------------------- training


def trained(fusion="logits", **settings):
    specialists = {name: specialist(layers=1) for name in ("text", "code", "math")}
    return fuse(specialists, gate="evidence", fusion=fusion, **settings)


LAYOUTS = {
    "padded": {},
    "end to end": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 96, "examples_per_domain": 1},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@every_fusion
def test_a_stage_moves_the_gate_alone_and_so_does_one_from_a_cache(fusion, layout, tmp_path):
    plain = trained(fusion)
    twin, before = copy.deepcopy(plain), weights(plain)
    settings = {"optim": "sgd", "learning_rate": 0.1, **LAYOUTS[layout]}
    one = build(GateTrainer, plain, tmp_path / "plain", **settings)
    batch = next(iter(one.get_train_dataloader()))
    given = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids", "labels") if key in batch}
    loss = plain(**given).loss
    torch.testing.assert_close(one.compute_loss(plain, dict(batch)), loss, rtol=1e-5, atol=1e-5)
    two = build(CachedGateTrainer, twin, tmp_path / "cached", cached={"cache": tmp_path / "cache"}, **settings)
    one.train(), two.train()
    for step, cached in zip(logs(one), logs(two), strict=True):
        assert cached["loss"] == pytest.approx(step["loss"], abs=1e-5)
    torch.testing.assert_close(weights(two.fused), weights(one.fused), rtol=1e-4, atol=1e-5)
    moved = changed(plain, before)
    assert {name.removeprefix("model.fusion_gate.") for name in moved} >= {
        "hidden_evidence_weight",
        "skip_evidence_weight",
    }
    assert all("fusion_gate" in name for name in moved)


@every_reader
def test_the_loss_of_trls_own_head_is_the_models_own(gate, specialists, tmp_path):
    model = fuse(specialists, gate=gate)
    trainer = sft_trainer(model, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        own, theirs = model.eval()(**batch), model(**batch, fused_lm_head=True)
    torch.testing.assert_close(own.loss, theirs.loss, rtol=1e-5, atol=0)


def test_a_cache_without_evidence_is_refused_and_one_with_it_serves_other_gates(tmp_path):
    own, cached = {name: specialist(layers=1) for name in ("text", "code")}, {"cached": {"cache": tmp_path / "cache"}}
    model = fuse(own, gate="evidence")
    build(CachedGateTrainer, model, tmp_path / "one", **cached).train()
    plain = fuse(own, gate="linear")
    trainer = build(CachedGateTrainer, plain, tmp_path / "two", **cached)
    assert trainer.cache.complete
    trainer.train()
    other = {"cached": {"cache": tmp_path / "other"}}
    build(CachedGateTrainer, plain, tmp_path / "three", **other).train()
    with pytest.raises(ValueError, match=r"evidence is None in the cache .* Choose another folder"):
        build(CachedGateTrainer, model, tmp_path / "four", **other)


@every_fusion
def test_specialists_learn_under_a_gate_that_has_nothing_to_learn(fusion, tmp_path):
    model = fuse({name: specialist(layers=1) for name in ("text", "code", "math")}, gate="posterior", fusion=fusion)
    with pytest.raises(ValueError, match="gate='posterior' has no parameters: there is nothing to train"):
        build(GateTrainer, model, tmp_path / "one")
    before = weights(model)
    trainer = build(JointTrainer, model, tmp_path / "two", learning_rate=1e-3)
    batch = next(iter(trainer.get_train_dataloader()))
    given = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), model(**given).loss, rtol=1e-5, atol=1e-5)
    trainer.train()
    assert any("specialists" in name for name in changed(model, before))


def test_scales_of_a_calibrated_gate_read_evidence_too(specialists):
    fused, ids = fuse(specialists, gate="evidence", gate_calibration=True), prompt()
    with torch.no_grad():
        fused.model.fusion_gate.skip_evidence_weight[3:] *= 0.02
        found = fused(ids)
        fused.model.fusion_gate.skip_evidence_weight[3:] = 0
        assert not torch.equal(fused(ids).logit_scales, found.logit_scales)
    assert found.logit_scales.shape == (2, 9, 1)


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
    check_servable_by_vllm(alike)
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
