"""Mixed examples and dropout of the gate: what teaches a gate to follow changes of domain."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.stages import BOTH, trainer
from trainers import CachedGateTrainer, GateTrainer, JointTrainer
from trainers.losses import gate_terms
from trainers.mixed import MIXED, TURNS, mixed_examples


# every token tells its domain, its row and its place
PARTS = {
    name: Dataset.from_list(
        [{"input_ids": (ids := [d * 10**6 + r * 10**3 + i for i in range(300)]), "labels": ids} for r in range(4)]
    )
    for d, name in enumerate(["code", "math", "text"], start=1)
}


def turns(ids):
    """Pieces of rows that follow each other. Each a list of tokens."""
    pieces = [[ids[0]]]
    for before, token in zip(ids, ids[1:], strict=False):
        if token == before + 1:
            pieces[-1].append(token)
        else:
            pieces.append([token])
    return pieces


def test_a_mixed_example_begins_with_a_row_and_changes_the_domain_at_every_turn():
    for row in mixed_examples(PARTS, 0.5, seed=0):
        pieces = turns(row["input_ids"])
        assert row["input_ids"] == row["labels"]
        assert len(row["labels"]) == 300
        assert pieces[0][0] % 1000 == 0
        domains = [piece[0] // 10**6 for piece in pieces]
        assert all(one != two for one, two in zip(domains, domains[1:], strict=False))
        assert len(pieces) >= 300 / TURNS[1]
        assert max(map(len, pieces)) <= TURNS[1]


def test_there_are_as_many_mixed_examples_as_their_share_of_all_asks_for():
    assert len(mixed_examples(PARTS, 0.25, seed=0)) == 4
    assert len(mixed_examples(PARTS, 0.01, seed=0)) == 1


def test_the_same_seed_makes_the_same_mixed_examples_and_another_others():
    one, same, other = (mixed_examples(PARTS, 0.5, seed)["input_ids"][:] for seed in (0, 0, 1))
    assert one == same != other


def test_labels_that_are_masked_stay_masked():
    masked = {name: part.map(lambda row: {"labels": [-100, *row["labels"][1:]]}) for name, part in PARTS.items()}
    for row in mixed_examples(masked, 0.5, seed=0):
        assert all(
            label == (-100 if i % 1000 == 0 else i) for i, label in zip(row["input_ids"], row["labels"], strict=True)
        )


@BOTH
def test_a_share_of_every_batch_is_mixed_and_is_logged_as_a_domain(stage, fused, tmp_path):
    run = trainer(stage, fused, tmp_path, mixed_share=0.25, examples_per_domain=4, per_device_train_batch_size=12)
    places = run.train_dataset["domain"]
    draws = [places[i] for i in run.sampler]
    assert all(draws[i : i + 12].count(MIXED) == 3 for i in range(0, len(draws), 12))
    assert {draws[:12].count(d) for d in run.domains} == {3}
    run.train()
    log = run.state.log_history[0]
    assert log["loss/mixed"] > 0
    assert log["mix/mixed"] == 0.25
    assert log["gate/mixed/text"] > 0


@pytest.mark.parametrize("settings", [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}])
def test_mixed_examples_go_with_rows_that_are_packed(settings, fused, tmp_path):
    run = trainer(GateTrainer, fused, tmp_path, mixed_share=0.5, **settings)
    run.train()
    assert run.state.log_history[0]["tokens/mixed"] > 0


@pytest.mark.grid
@BOTH
@pytest.mark.parametrize(
    "settings",
    [
        {"mix_reward": "regret"},
        {"mix_reward": "loss"},
        {"gate_domain": 0.1},
        {"mix_unit": "token"},
        {"mix_importance": 1},
    ],
)
def test_what_is_told_by_domain_leaves_mixed_examples_out(stage, settings, fused, tmp_path):
    settings = {**settings, "mix_importance": "mix_importance" in settings}
    run = trainer(stage, fused, tmp_path, mixed_share=0.25, mix_every=1, max_steps=4, mix_delay=1, **settings)
    run.train()
    assert torch.tensor([log["loss"] for log in run.state.log_history if "loss" in log]).isfinite().all()
    assert all(mix[-1] == 0.25 and len(mix) == 4 for _, mix in run.sampler.mixes)
    if run.controller is not None:
        assert len(run.sampler.mixes) > 1
        assert run.controller.rewards.shape == (3,)


def test_the_warm_start_of_the_gate_reads_no_mixed_example(fused, tmp_path):
    domain = torch.tensor([[0, 3]])
    run = trainer(GateTrainer, fused, tmp_path, mixed_share=0.25, gate_domain=1.0)
    term = gate_terms(run.args, torch.full((1, 2, 3), 1 / 3), domain, run.own_specialists, run.statistics.last_mean, 0)
    assert term[0, 0] > 0
    assert term[0, 1] == 0


@pytest.mark.e2e
def test_a_cached_stage_draws_and_says_what_an_ordinary_one_does(specialists, tmp_path):
    losses = []
    for cls, more in ((GateTrainer, {}), (CachedGateTrainer, {"more": {"cache": tmp_path / "cache"}})):
        torch.manual_seed(0)
        fused = UltraFuserForCausalLM.from_specialists(specialists)
        run = trainer(cls, fused, tmp_path, mixed_share=0.25, **more)
        run.train()
        losses.append([log["loss/mixed"] for log in run.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.e2e
def test_a_run_with_mixed_examples_resumes_where_it_was(specialists, tmp_path):
    ended = []
    for name, steps in (("whole", None), ("part", 2)):
        settings = {"save_strategy": "steps", "save_steps": 2, "mixed_share": 0.5, "gate_dropout": 0.2, "max_steps": 4}
        torch.manual_seed(0)
        fused = UltraFuserForCausalLM.from_specialists(specialists)
        run = trainer(GateTrainer, fused, tmp_path / name, **settings)
        run.train(resume_from_checkpoint=None if steps is None else str(tmp_path / "whole" / f"checkpoint-{steps}"))
        ended.append(fused.model.fusion_gate.state_dict())
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])


def test_a_checkpoint_of_a_run_without_mixed_examples_is_not_resumed_with_them(fused, tmp_path):
    trainer(GateTrainer, fused, tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    with pytest.raises(ValueError, match="mixed_share|sizes"):
        trainer(GateTrainer, fused, tmp_path, mixed_share=0.25).train(resume_from_checkpoint=True)


def test_rows_without_tokens_cannot_be_mixed():
    with pytest.raises(ValueError, match="no `input_ids`"):
        mixed_examples({"a": Dataset.from_list([{"text": "x"}]), "b": PARTS["text"]}, 0.5, 0)


def test_one_domain_alone_cannot_be_mixed():
    with pytest.raises(ValueError, match="only \\['text'\\]"):
        mixed_examples({"text": PARTS["text"]}, 0.5, 0)


def test_a_domain_of_that_name_is_refused(fused, tmp_path):
    data = {MIXED: PARTS["text"], "code": PARTS["code"]}
    with pytest.raises(ValueError, match="Rename it"):
        trainer(GateTrainer, fused, tmp_path, data, mixed_share=0.5)


@pytest.mark.parametrize("settings", [{"mixed_share": 1.0}, {"mixed_share": -0.1}, {"gate_dropout": 1.0}])
def test_shares_that_leave_nothing_are_refused(settings, fused, tmp_path):
    with pytest.raises(ValueError, match=next(iter(settings))):
        trainer(GateTrainer, fused, tmp_path, **settings)


def test_dropout_hides_hidden_states_in_training_alone(fused, tmp_path):
    trainer(GateTrainer, fused, tmp_path, gate_dropout=0.5)
    gate = fused.model.fusion_gate
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    states = [torch.randn(1, 4, c.hidden_size) for c in fused.config.specialists]
    gate.eval()
    assert torch.equal(gate(states).weights, gate(states).weights)
    gate.train()
    assert not torch.equal(gate(states).weights, gate(states).weights)


def test_dropout_reaches_the_copy_of_the_gate_that_adapters_are_trained_beside(fused, tmp_path):
    stage = trainer(
        JointTrainer, fused, tmp_path, gate_dropout=0.5, more={"peft_config": LoraConfig(target_modules=["q_proj"])}
    )
    for parameter in stage.fused.model.fusion_gate.parameters():
        torch.nn.init.normal_(parameter)
    ids = torch.tensor([[1, 20, 33]])
    stage.model.eval()
    assert torch.equal(stage.fused.gate_weights(ids), stage.fused.gate_weights(ids))
    stage.model.train()
    assert not torch.equal(stage.fused.gate_weights(ids), stage.fused.gate_weights(ids))


@pytest.mark.grid
@pytest.mark.parametrize("gate", ["constant", "uniform", "posterior"])
def test_dropout_of_a_gate_that_reads_no_states_is_refused(gate, specialists, tmp_path):
    fused = UltraFuserForCausalLM.from_specialists(specialists, gate=gate)
    with pytest.raises(ValueError, match=f"the gate '{gate}' reads none"):
        trainer(JointTrainer, fused, tmp_path, gate_dropout=0.5)


@pytest.mark.parametrize("row", [{"text": ""}, {"prompt": "a" * 40, "completion": "b"}])
def test_a_domain_with_nothing_to_learn_is_named_before_it_is_mixed(row, fused, tmp_path):
    texts = Dataset.from_list([{"text": "abc"}] * 4)
    with pytest.raises(ValueError, match="nothing is left of \\['text'\\]"):
        trainer(
            GateTrainer,
            fused,
            tmp_path,
            {"text": Dataset.from_list([row] * 4), "code": texts},
            mixed_share=0.5,
            max_length=32,
            per_device_train_batch_size=4,
        )
