"""Mixes that learn, through the trainers: each reward against a computation by hand, and what learning leaves alone."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F  # noqa: N812

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import changed, weights
from tests.support.stage_run import data as sums
from tests.support.stages import batch_of, logs, trainer
from tests.support.tiny import specialist
from trainers import GateTrainer, JointTrainer
from trainers.mix.policies import POLICIES


SIZES = {"code": 7, "math": 12, "text": 9}
NAMES = list(SIZES)
POOL = ["difficulty", "similarity", "gradient", "uncertainty"]


def learn(stage, model, folder, reward, *, data=None, **settings):
    """A stage that updates its mix at every step, by just what it has measured."""
    defaults = {"mix_every": 1, "mix_probe": 4, "mix_policy": "rate", "mix_smoothing": 1.0, "learning_rate": 0.0}
    settings = {**defaults, "max_steps": 1, **settings}
    return trainer(stage, model, folder, sums(SIZES) if data is None else data, mix_reward=reward, **settings)


@pytest.fixture
def mild(fused):
    """A gate that prefers without excluding, so that every specialist's part in a gradient shows."""
    for parameter in fused.model.fusion_gate.parameters():
        parameter.data *= 0.2
    return fused


def token_losses(logits, labels):
    """Shape (batch, seq - 1), 0 where there is no label."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none").view(
        labels[:, 1:].shape
    )


def pool_of(stage):
    """The pool's examples one by one, without padding, by domain."""
    rows = [stage.train_dataset[i] for i in stage.controller.probe.places]
    for name in NAMES:
        yield name, [stage.data_collator([row]) for row in rows if row["domain"] == name]


def run_model(model, batch, **kwargs):
    kept = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    return model(**kept, use_cache=False, **kwargs)


# ---- rewards


@pytest.mark.parametrize("reward", ["loss", "regret"])
def test_rewards_from_batches(reward, mild, tmp_path):
    stage = learn(GateTrainer, mild, tmp_path, reward)
    batch = batch_of(stage)
    stage.train()
    mild.eval()
    with torch.no_grad():
        fused = token_losses(run_model(mild, batch).logits, batch["labels"])
        own = {n: token_losses(run_model(mild.specialist(n), batch).logits, batch["labels"]) for n in NAMES}
    for d, name in enumerate(NAMES):
        mask = (batch["domain"][:, 1:] == d) & (batch["labels"][:, 1:] != -100)
        loss = fused[mask].mean()
        expected = loss if reward == "loss" else (loss - own[name][mask].mean()).exp()
        assert stage.controller.rewards[d] == pytest.approx(expected.item(), rel=1e-5)


def test_regret_in_stage_two_is_against_the_specialists_of_before(mild, tmp_path):
    before = copy.deepcopy(mild).eval()
    stage = learn(JointTrainer, mild, tmp_path, "regret", learning_rate=1e-2, per_device_train_batch_size=2)
    stage.train()
    mild.eval()
    with torch.no_grad():
        for d, (name, pool) in enumerate(pool_of(stage)):
            own = before.specialist(name)
            found = [
                (run_model(mild, b).logits, run_model(own, b).logits, b["labels"])
                for b in pool  # fused as it is now, the specialist as it was
            ]
            changes = [token_losses(now, ids).mean() - token_losses(then, ids).mean() for now, then, ids in found]
            assert stage.controller.rewards[d] == pytest.approx(torch.stack(changes).exp().mean().item(), rel=1e-4)


def test_difficulty_is_1_at_the_start(mild, tmp_path):
    stage = learn(JointTrainer, mild, tmp_path, "difficulty")
    stage.train()
    assert stage.controller.rewards.tolist() == [1, 1, 1]


def test_difficulty_is_perplexity_against_the_start(mild, tmp_path):
    before = copy.deepcopy(mild).eval()
    stage = learn(JointTrainer, mild, tmp_path, "difficulty", learning_rate=1e-2)
    stage.train()
    mild.eval()
    with torch.no_grad():
        for d, (_, pool) in enumerate(pool_of(stage)):
            changes = [mild(**b).loss - before(**b).loss for b in map(without_domain, pool)]
            assert stage.controller.rewards[d] == pytest.approx(torch.stack(changes).exp().mean().item(), rel=1e-4)
    assert (stage.controller.rewards < 1).all()


def without_domain(batch):
    return {**{k: v for k, v in batch.items() if k != "domain"}, "use_cache": False}


@pytest.mark.parametrize("target", [None, "math"])
def test_similarity_does_not_depend_on_padding(target, mild, tmp_path):
    stage = learn(GateTrainer, mild, tmp_path, "similarity", mix_target=target)
    stage.train()
    with torch.no_grad():
        means = [
            torch.stack([run_model(mild.model.eval(), b).last_hidden_state[0].double().mean(0) for b in pool]).mean(0)
            for _, pool in pool_of(stage)
        ]
    z = F.normalize(torch.stack(means), dim=-1)
    expected = (z @ z.T).mean(1) if target is None else (z @ z.T)[:, NAMES.index(target)]
    assert stage.controller.rewards == pytest.approx(expected.numpy(), rel=1e-5)


def test_gradients_are_compared_over_two_halves_of_the_pool(mild, tmp_path):
    stage = learn(GateTrainer, mild, tmp_path, "gradient")
    stage.train()
    mild.eval()
    halves = [[], []]
    for _, pool in pool_of(stage):
        for half in (0, 1):
            losses = [token_losses(run_model(mild, b).logits, b["labels"]).sum() for b in pool[half::2]]
            tokens = sum(b["labels"].shape[1] - 1 for b in pool[half::2])
            gradients = torch.autograd.grad(sum(losses) / tokens, [*mild.model.fusion_gate.parameters()])
            halves[half].append(torch.cat([g.flatten() for g in gradients]))
    held_out, training = (F.normalize(torch.stack(half).double(), dim=-1) for half in halves)
    expected = (training @ held_out.T).mean(1)
    assert stage.controller.rewards == pytest.approx(expected.numpy(), abs=1e-4)


@pytest.mark.parametrize("domains", [2, 4])
def test_gradients_need_no_odd_number_of_domains(domains, mild, tmp_path):
    data = sums({f"domain{i}": 6 for i in range(domains)})
    stage = learn(GateTrainer, mild, tmp_path, "gradient", data=data, per_device_train_batch_size=2)
    stage.train()
    assert np.isfinite(stage.controller.rewards).all()


def test_uncertainty_is_the_mean_entropy(mild, tmp_path):
    stage = learn(GateTrainer, mild, tmp_path, "uncertainty")
    stage.train()
    with torch.no_grad():
        for d, (_, pool) in enumerate(pool_of(stage)):
            logits = [run_model(mild.eval(), b).logits[0, :-1].log_softmax(-1) for b in pool]
            expected = np.mean([-(p.exp() * p).sum(-1).mean().item() for p in logits])
            assert stage.controller.rewards[d] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("reward", ["regret", "difficulty"])
def test_the_domain_to_specialise_in_counts_twice(reward, mild, tmp_path):
    found = []
    for target in (None, "math"):
        stage = learn(GateTrainer, mild, tmp_path, reward, mix_target=target)
        stage.train()
        found.append(stage.controller.rewards)
    assert found[1] == pytest.approx(found[0] * [1, 2, 1])


# ---- what learning leaves alone


@pytest.mark.e2e
@pytest.mark.grid
@pytest.mark.parametrize("reward", ["regret", *POOL])
@pytest.mark.parametrize("stage", [GateTrainer, JointTrainer])
def test_learning_in_the_shadow_changes_nothing(stage, reward, tmp_path):
    # with dropout, so that a single random number taken on the way would show
    specialists = {name: specialist(layers=1 + i, attention_dropout=0.2) for i, name in enumerate(NAMES)}
    model, found = UltraFuserForCausalLM.from_specialists(specialists), []
    for learned in (None, reward):
        one = copy.deepcopy(model)
        settings = {
            "learning_rate": 1e-2,
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "mix_shadow": bool(learned),
        }
        run = learn(stage, one, tmp_path, learned, **settings)
        run.train()
        ours = [{k: v for k, v in e.items() if not k.startswith(("reward/", "learned_mix/"))} for e in logs(run)]
        found.append((weights(one), ours))
    assert changed(one, found[0][0]) == set()
    assert found[0][1] == found[1][1]
    assert run.controller.mixes[-1][1] != run.controller.mixes[0][1], "nothing was learned"


@pytest.mark.e2e
def test_loaders_that_read_ahead_change_nothing(mild, tmp_path):
    found = []
    for workers in (0, 2):
        one = copy.deepcopy(mild)
        settings = {"learning_rate": 1e-2, "max_steps": 9, "per_device_train_batch_size": 2, "mix_delay": 4}
        run = learn(GateTrainer, one, tmp_path, "regret", dataloader_num_workers=workers, **settings)
        run.train()
        found.append((weights(one), run.controller.mixes, logs(run)))
    assert changed(one, found[0][0]) == set()
    assert found[0][1:] == found[1][1:]


def test_a_mix_for_batches_already_read_is_refused(mild, tmp_path):
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "mix_delay": 1, "dataloader_num_workers": 2}
    with pytest.raises(RuntimeError, match="Raise `mix_delay`, or lower"):
        learn(GateTrainer, mild, tmp_path, "regret", **settings).train()


# ---- from rewards to draws


@pytest.mark.grid
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_learns_through_a_trainer(policy, mild, tmp_path):
    settings = {"mix_policy": policy, "max_steps": 8, "mix_delay": 2, "per_device_train_batch_size": 2}
    stage = learn(GateTrainer, mild, tmp_path, "loss", **settings)
    seen = []
    inner = stage.data_collator
    stage.data_collator = lambda rows: seen.extend(row["domain"] for row in rows) or inner(rows)
    stage.train()
    mixes = np.array([mix for _, mix in stage.controller.mixes])
    assert [start for start, _ in stage.controller.mixes] == [0, *range(3, 11)]
    assert mixes.sum(1) == pytest.approx(1)
    assert (mixes >= 0.05 - 1e-9).all()
    assert len({tuple(mix) for mix in mixes}) > 2
    drawn = [sum(d == name for d in seen[: 8 * 6]) for name in NAMES]
    assert drawn == stage.sampler.counts(8).tolist()
    expected = sum(stage.controller.mix_at(step) for step in range(8)) * 6
    assert drawn == pytest.approx(expected, abs=4), "each batch is within one of its mix"
    assert logs(stage)[-1]["mix/math"] == pytest.approx(stage.controller.mix_at(7)[1], abs=1e-6)


def test_importance_weights_keep_the_objective(mild, tmp_path):
    mix = {"code": 0.5, "math": 1 / 3, "text": 1 / 6}
    settings = {"mix": "fixed", "mix_weights": mix, "mix_importance": True}
    stage = trainer(GateTrainer, mild, tmp_path, sums(SIZES), learning_rate=0.0, max_steps=1, **settings)
    batch = batch_of(stage)
    stage.train()
    with torch.no_grad():
        losses = token_losses(run_model(mild.eval(), batch).logits, batch["labels"])
    factors = torch.tensor([1 / 3 / mix[name] for name in NAMES])[batch["domain"][:, 1:]]
    expected = (losses * factors).sum() / (batch["labels"][:, 1:] != -100).sum()
    assert logs(stage)[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.grid
@pytest.mark.parametrize("unit", ["example", "token", "supervised"])
def test_shares_count_in_their_unit(unit, mild, tmp_path):
    def rows(prompt, completion):
        return Dataset.from_list(
            [{"prompt": "x" * (prompt + i % 3), "completion": "y" * (completion + i % 2)} for i in range(10)]
        )

    data = {"code": rows(5, 30), "math": rows(40, 5), "text": rows(10, 10)}
    settings = {"mix": "fixed", "mix_weights": {"code": 1, "math": 2, "text": 1}, "mix_unit": unit}
    stage = trainer(GateTrainer, mild, tmp_path, data, **settings)
    counts = dict.fromkeys(NAMES, 0)
    for epoch in range(100):
        stage.sampler.set_epoch(epoch)
        for i in stage.sampler:
            row = stage.train_dataset[i]
            length = {"example": 1, "token": len(row["input_ids"])}.get(unit, sum(n != -100 for n in row["labels"]))
            counts[row["domain"]] += length
    shares = np.array([counts[name] for name in NAMES]) / sum(counts.values())
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.01)


def test_a_reward_that_is_not_a_number_freezes_the_mix(mild, tmp_path, monkeypatch):
    stage = learn(GateTrainer, mild, tmp_path, "loss", max_steps=3)
    measure = stage.controller.reward.measure
    broken = iter([False, True, False])
    monkeypatch.setattr(stage.controller.reward, "measure", lambda: measure() * (np.nan if next(broken) else 1))
    with pytest.warns(UserWarning, match="The mix stays as it is, because a reward is not finite"):
        stage.train()
    assert [start for start, _ in stage.controller.mixes] == [0, 3, 5]
    assert np.isfinite(stage.controller.smoothing.value).all()


def test_a_domain_seen_often_enough_is_left_out(mild, tmp_path):
    data = sums({"code": 3, "math": 30, "text": 30})
    settings = {"max_steps": 8, "mix_max_epochs": 1.0, "per_device_train_batch_size": 2}
    stage = learn(GateTrainer, mild, tmp_path, "regret", data=data, **settings)
    stage.train()
    shares = [mix[0] for _, mix in stage.controller.mixes]
    assert shares[1] > 0
    assert shares[2:] == [0] * len(shares[2:]), "2 a step, so that all 3 are seen after 2 steps"
    assert stage.sampler.counts(8)[0] == stage.sampler.counts(4)[0] <= 8


def test_a_domain_without_a_share_stays_without_one(mild, tmp_path):
    settings = {"max_steps": 4, "mix": "fixed", "mix_weights": {"code": 1, "text": 1}}
    stage = learn(GateTrainer, mild, tmp_path, "regret", **settings)
    stage.train()
    assert all(mix[1] == 0 for _, mix in stage.controller.mixes)
    assert stage.sampler.counts(20)[1] == 0
    assert all(entry["tokens/math"] == 0 for entry in logs(stage))
