"""What a stage logs and warns of, and the terms of the gate's loss."""

import copy
import warnings

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.fusions import MIXTURES
from tests.support.stage_run import data as sums
from tests.support.stages import BOTH, batch_of, domains, logs, trainer
from trainers import GateTrainer


# ---- what is watched


@pytest.mark.grid
@BOTH
@pytest.mark.parametrize("fusion", MIXTURES)
def test_logged_numbers_are_those_of_the_model(stage, fusion, specialists, tmp_path):
    model = UltraFuserForCausalLM.from_specialists(specialists, fusion=fusion)
    for parameter in model.model.fusion_gate.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    run = trainer(
        stage,
        model,
        tmp_path,
        sums({"text": 9, "code": 7, "math": 12}),
        learning_rate=0.0,
        max_steps=1,
        gate_scale=0.0,
    )
    batch = batch_of(run)
    run.train()
    (found,) = logs(run)
    domain = batch.pop("domain")[:, 1:]
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        outputs = model.eval()(**batch, use_cache=False)
    nll = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    gate = outputs.gate_weights[:, :-1]
    assert found["loss"] == pytest.approx((nll.sum() / (labels != -100).sum()).item(), rel=1e-5)
    for d, name in enumerate(("code", "math", "text")):
        mask = (labels != -100) & (domain == d)
        assert found[f"tokens/{name}"] == mask.sum()
        assert found[f"loss/{name}"] == pytest.approx(nll[mask].mean().item(), abs=1e-5)
        entropy = torch.special.entr(gate).sum(-1)[mask].mean()
        assert found[f"gate_entropy/{name}"] == pytest.approx(entropy.item(), abs=1e-5)
        sharpness = outputs.logit_scales[:, :-1][mask].log().mean().exp()
        assert found[f"gate_scale/{name}"] == pytest.approx(sharpness.item(), abs=1e-4)
        for k, own in enumerate(model.config.specialist_names):
            assert found[f"gate/{name}/{own}"] == pytest.approx(gate[mask][:, k].mean().item(), abs=1e-5)
            top1 = (gate[mask].argmax(-1) == k).float().mean()
            assert found[f"top1/{name}/{own}"] == pytest.approx(top1.item(), abs=1e-5)


def test_a_gate_that_has_collapsed_is_told_once(specialists, tmp_path):
    model = UltraFuserForCausalLM.from_specialists(specialists, gate="constant")
    (numbers,) = model.model.fusion_gate.parameters()
    numbers.data.flatten()[0] = 9.0
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(GateTrainer, model, tmp_path, learning_rate=0.0).train()
    told = [str(w.message) for w in told if "collapsed" in str(w.message)]
    assert len(told) == 1
    assert "'text' has 100.0%" in told[0]


@pytest.mark.e2e
def test_a_gate_that_does_not_move_is_told(specialists, tmp_path):
    model = UltraFuserForCausalLM.from_specialists(specialists)
    with pytest.warns(UserWarning, match="hardly moved after 21 steps.*Raise `learning_rate`"):
        trainer(GateTrainer, model, tmp_path, learning_rate=1e-8, max_steps=22).train()


@pytest.mark.e2e
def test_a_gate_that_is_very_sure_is_told(specialists, tmp_path):
    model = UltraFuserForCausalLM.from_specialists(specialists, gate="constant+calibration")
    (numbers,) = model.model.fusion_gate.parameters()
    numbers.data.flatten()[-1] = 1.0
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(GateTrainer, model, tmp_path, learning_rate=0.0, max_steps=23).train()
    (told,) = [str(w.message) for w in told if "multiplies logits" in str(w.message)]
    assert "by 2.7 in 'code'" in told


# ---- gate terms


@pytest.mark.e2e
def test_gate_terms_move_the_gate_their_way(fused, tmp_path):
    for parameter in fused.model.fusion_gate.parameters():
        parameter.data *= 0.2  # opinions that can change

    def last(**settings):
        run = trainer(
            GateTrainer,
            copy.deepcopy(fused),
            tmp_path,
            max_steps=15,
            learning_rate=3e-2,
            **settings,
        )
        run.train()
        found = logs(run)[-1]
        shares = {n: [found[f"gate/{d}/{n}"] for d in run.domains] for n in run.domains}
        return {
            "entropy": sum(found[f"gate_entropy/{d}"] for d in run.domains),
            "unbalance": sum(sum(of) ** 2 for of in shares.values()),
            "own": sum(found[f"gate/{d}/{d}"] for d in run.domains),
        }

    plain = last()
    assert last(gate_entropy=1.0)["entropy"] < plain["entropy"] - 0.1
    assert last(gate_balance=5.0)["unbalance"] < plain["unbalance"]
    assert last(gate_domain=5.0, gate_domain_steps=100)["own"] > plain["own"] + 0.02


def test_the_warm_start_of_the_gate_ends(fused, tmp_path):
    def losses(**settings):
        run = trainer(GateTrainer, copy.deepcopy(fused), tmp_path, learning_rate=0.0, max_steps=4, **settings)
        run.train()
        return [entry["loss"] for entry in logs(run)]

    extra = [a - b for a, b in zip(losses(gate_domain=1.0, gate_domain_steps=2), losses(), strict=True)]
    assert extra[0] > 1.5 * extra[1] > 0
    assert extra[2:] == [0, 0]


def test_domains_without_a_specialist_cannot_lead_the_gate(fused, tmp_path):
    with pytest.raises(ValueError, match="domains must be named as specialists are, but domains are \\['a', 'b'\\]"):
        trainer(GateTrainer, fused, tmp_path, domains({"a": 4, "b": 4}), gate_domain=1.0)
