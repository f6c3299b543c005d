"""Stages of training under gates that read evidence."""

import copy

import pytest
import torch

from modeling_ultrafuser.gate_base_ultrafuser import Reads
from modeling_ultrafuser.gates_ultrafuser import GATES
from tests.support.conversations import changed, sft_trainer, weights
from tests.support.fusions import MIXTURES
from tests.support.mixes import MIXES, fuse, prompt
from tests.support.stages import build, logs
from tests.support.tiny import specialist
from trainers import GateTrainer, JointTrainer
from trainers.gate_cache import CachedGateTrainer


READERS = [name for name, gate in GATES.items() if Reads.PAST in gate.reads]


every_reader = pytest.mark.parametrize("gate", READERS)


every_fusion = pytest.mark.parametrize("fusion", MIXTURES)


@pytest.fixture
def specialists():
    return MIXES["one family"]()


# ---------------------------------------------------------------------------------------------- training


def trained(fusion="logits", **settings):
    specialists = {name: specialist(layers=1) for name in ("text", "code", "math")}
    return fuse(specialists, gate="evidence", fusion=fusion, **settings)


LAYOUTS = {
    "padded": {},
    "end to end": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 96, "examples_per_domain": 1},
}


@pytest.mark.grid
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


@pytest.mark.e2e
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
