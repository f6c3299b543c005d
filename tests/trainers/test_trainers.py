import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

import trainers.heads.chunks
from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.gates_ultrafuser import DEFAULT_GATE
from tests.support.conversations import changed, conversations, weights
from tests.support.fusions import MIXTURES
from tests.support.stage_run import data as sums
from tests.support.stages import BOTH, batch_of, domains, logs, trainer
from tests.support.tiny import specialist
from trainers import GateTrainer, JointTrainer, StratifiedSampler
from trainers.stage_config import scaled_rate


TERMS = {"gate_entropy": 0.1, "gate_balance": 0.2, "gate_domain": 0.1, "mix_importance": True}


@BOTH
def test_a_stage_moves_its_own_parameters_and_no_others(stage, fused, tmp_path):
    before = weights(fused)
    trainer(stage, fused, tmp_path).train()
    moved = {".".join(name.split(".")[:2]) for name in changed(fused, before)}
    everything = {"model.fusion_gate", "model.specialists", "lm_head.weight"}
    assert moved == ({"model.fusion_gate"} if stage is GateTrainer else everything)


@pytest.mark.e2e
def test_stage_two_continues_from_stage_one_although_stage_one_froze_the_specialists(fused, tmp_path):
    trainer(GateTrainer, fused, tmp_path).train()
    before = weights(fused)
    trainer(JointTrainer, fused, tmp_path).train()
    assert any(name.startswith("model.specialists") for name in changed(fused, before))


def test_every_batch_holds_the_same_number_of_examples_of_each_domain(fused, tmp_path):
    stage = trainer(GateTrainer, fused, tmp_path, domains({"text": 30, "code": 3, "math": 11}))
    names = stage.train_dataset["domain"]
    draws = [names[i] for i in stage._get_train_sampler()]
    batches = [draws[i : i + 6] for i in range(0, len(draws), 6)]
    assert all(batch.count(d) == 2 for batch in batches for d in ("text", "code", "math"))


def test_a_domain_is_drawn_whole_before_it_repeats_in_another_order():
    sampler = StratifiedSampler(["a"] * 12 + ["b"] * 4, 4)
    draws = [i for i in sampler if i >= 12]
    assert len(draws) == 8
    assert sorted(draws[:4]) == sorted(draws[4:]) == [12, 13, 14, 15]
    assert draws[:4] != draws[4:]


def test_the_next_epoch_continues_the_stream():
    one, two = StratifiedSampler(["a"] * 6 + ["b"] * 6, 4), StratifiedSampler(["a"] * 6 + ["b"] * 6, 4)
    two.set_epoch(1)
    assert sorted(one) == sorted(two) == list(range(12))
    assert list(one) != list(two)


def test_another_seed_gives_another_stream_and_the_same_seed_the_same():
    labels = ["a"] * 20 + ["b"] * 20
    assert list(StratifiedSampler(labels, 4, seed=0)) == list(StratifiedSampler(labels, 4, seed=0))
    assert list(StratifiedSampler(labels, 4, seed=0)) != list(StratifiedSampler(labels, 4, seed=1))


@pytest.mark.e2e
def test_an_interrupted_stage_ends_where_an_uninterrupted_one_ends(specialists, tmp_path):
    def fuse():
        return UltraFuserForCausalLM.from_specialists(specialists)

    whole, halves = fuse(), fuse()
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 3}
    trainer(JointTrainer, whole, tmp_path, **settings).train()
    trainer(JointTrainer, halves, tmp_path / "again", **settings).train(str(tmp_path / "checkpoint-3"))
    assert changed(halves, weights(whole)) == set()


def test_data_without_domains_is_refused(fused, tmp_path):
    with pytest.raises(ValueError, match="needs a column 'domain', but its columns are \\['messages'\\]"):
        trainer(GateTrainer, fused, tmp_path, Dataset.from_list(conversations()))


def test_a_gate_without_parameters_is_refused(specialists, tmp_path):
    model = UltraFuserForCausalLM.from_specialists(specialists, gate="uniform")
    with pytest.raises(ValueError, match="gate='uniform' has no parameters"):
        trainer(GateTrainer, model, tmp_path)


def test_a_single_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got a LlamaForCausalLM"):
        trainer(JointTrainer, specialist(), tmp_path)


# ---- what moves, and how fast


@pytest.mark.e2e
@pytest.mark.grid
@BOTH
@pytest.mark.parametrize("terms", [{}, TERMS])
@pytest.mark.parametrize("fusion", MIXTURES)
def test_accumulated_batches_are_one_large_batch(stage, terms, fusion, specialists, tmp_path):
    found = []
    model = UltraFuserForCausalLM.from_specialists(specialists, fusion=fusion)
    for at_once in (8, 1):
        settings = {**terms, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "examples_per_domain": 4}
        settings |= {"mix": "fixed", "mix_weights": {"text": 3, "code": 1}, "max_steps": 2}
        one = copy.deepcopy(model)
        run = trainer(
            stage, one, tmp_path, sums({"text": 9, "code": 7}), per_device_train_batch_size=at_once, **settings
        )
        run.train()
        assert run.args.gradient_accumulation_steps == 8 // at_once
        found.append((weights(one), [entry["loss"] for entry in logs(run)]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


def test_stage_two_with_adapters_moves_them_and_the_gate(fused, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    stage = trainer(JointTrainer, fused, tmp_path, more={"peft_config": lora})
    before = weights(stage.model)
    stage.train()
    moved = changed(stage.model, before)
    assert all("lora_" in name or "fusion_gate.modules_to_save" in name for name in moved)
    assert {"lora_B" in name for name in moved} == {True, False}
    assert logs(stage)[-1]["gate/code/code"] != logs(stage)[0]["gate/code/code"]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_specialists_that_are_not_chosen_stay_as_they_are(weight_decay, fused, tmp_path):
    before = weights(fused)
    settings = {"train_specialists": ["text", "math"], "weight_decay": weight_decay}
    trainer(JointTrainer, fused, tmp_path, **settings).train()
    moved = changed(fused, before)
    assert {n.split(".")[2] for n in moved if ".specialists." in n} == {"text", "math"}
    assert any("fusion_gate" in n for n in moved)
    sizes = [c.hidden_size for c in fused.config.specialists]
    columns = (fused.lm_head.weight != before["lm_head.weight"]).any(0).split(sizes)
    assert [bool(c.any()) for c in columns] == [name != "code" for name in fused.config.specialist_names]


def test_a_specialist_that_is_not_there_cannot_be_trained(fused, tmp_path):
    with pytest.raises(ValueError, match="`train_specialists` must name some of .* but is \\['poetry'\\]"):
        trainer(JointTrainer, fused, tmp_path, train_specialists=["poetry"])


def test_a_pattern_for_every_name_is_the_stage_without_one(fused, tmp_path):
    twin = copy.deepcopy(fused)
    trainer(JointTrainer, twin, tmp_path).train()
    trainer(JointTrainer, fused, tmp_path, train_only=".*").train()
    assert changed(fused, weights(twin)) == set()


def test_what_matches_the_pattern_moves_alone(fused, tmp_path):
    before = weights(fused)
    settings = {
        "train_only": r".*layers\.0\.mlp.*|lm_head.*",
        "train_specialists": ["text", "math"],
        "weight_decay": 0.1,
    }
    trainer(JointTrainer, fused, tmp_path, **settings).train()
    parts = ("up_proj", "gate_proj", "down_proj")
    layers = {f"model.specialists.{n}.layers.0.mlp.{p}.weight" for n in ("text", "math") for p in parts}
    assert changed(fused, before) == layers | {"lm_head.weight"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"train_only": "lm_haed"}, r"'lm_haed' matches none. The nearest are \['lm_head.weight', '[^']+', '[^']+'\]"),
        ({"train_only": r".*specialists\.code.*", "train_specialists": ["text"]}, "matches none"),
        ({"train_only": "*"}, r"is a regular expression, but '\*' is none: nothing to repeat"),
        ({"train_only": 3}, "`train_only` must be str or nothing, but is '3'"),
    ],
)
def test_a_pattern_that_chooses_nothing_is_refused(settings, told, fused, tmp_path):
    with pytest.raises(ValueError, match=told):
        trainer(JointTrainer, fused, tmp_path, **settings)


def test_a_pattern_beside_adapters_is_refused(fused, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="`train_only` and `peft_config` both choose what moves.*target_modules='x'"):
        trainer(JointTrainer, fused, tmp_path, more={"peft_config": lora}, train_only="x")


def test_the_parts_of_the_model_learn_at_their_own_rates(fused, tmp_path):
    rates = {"learning_rate": 1e-3, "gate_learning_rate": 1e-2, "head_learning_rate": 1e-4}
    stage = trainer(JointTrainer, fused, tmp_path, weight_decay=0.1, **rates)
    names = {id(p): name for name, p in fused.named_parameters()}
    found = {}
    for group in stage.create_optimizer().param_groups:
        for parameter in group["params"]:
            found[names.pop(id(parameter))] = group["lr"]
    assert not names, "some parameters are in no group"
    for name, rate in found.items():
        expected = "gate_learning_rate" if "gate." in name and "fusion" in name else "learning_rate"
        assert rate == rates["head_learning_rate" if name == "lm_head.weight" else expected], name
    stage.train()
    assert {group["lr"] for group in stage.optimizer.param_groups} == {0.0}, "the schedule reaches every group"


def test_the_default_rate_is_the_papers_for_large_specialists_and_higher_for_small_ones(fused, tmp_path):
    assert trainer(GateTrainer, fused, tmp_path, learning_rate=None).args.learning_rate == pytest.approx(1e-2)
    assert trainer(JointTrainer, fused, tmp_path, learning_rate=None).args.learning_rate == pytest.approx(3e-4)
    for at_a_million in (1e-2, 3e-4):
        assert scaled_rate(1e9, at_a_million) == scaled_rate(7e10, at_a_million) == pytest.approx(2e-5)
        assert scaled_rate(1e6, at_a_million) == scaled_rate(1e4, at_a_million) == pytest.approx(at_a_million)
        assert 2e-5 < scaled_rate(1e8, at_a_million) < scaled_rate(1e7, at_a_million) < at_a_million


# ---- the loss


@pytest.mark.grid
@BOTH
@pytest.mark.parametrize(("gate", "dtype"), [("mlp", torch.float32), (DEFAULT_GATE, torch.float64)])
@pytest.mark.parametrize("fusion", MIXTURES)
def test_the_loss_in_chunks_is_the_models_own(fusion, gate, dtype, stage, specialists, tmp_path, monkeypatch):
    monkeypatch.setitem(trainers.heads.chunks.CHUNK, "cpu", 5)
    model = UltraFuserForCausalLM.from_specialists(specialists, fusion=fusion, gate=gate, dtype=dtype)
    for parameter in model.model.fusion_gate.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    run = trainer(stage, model, tmp_path, gate_scale=0.0)
    batch = batch_of(run)
    own_gradients = {}
    loss = model(**{k: v for k, v in batch.items() if k != "domain"}, use_cache=False).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        own_gradients[name], parameter.grad = parameter.grad, None
    model.train()
    run.warned = set()
    chunked = run.compute_loss(model, dict(batch))
    chunked.backward()
    assert chunked.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, own_gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.e2e
def test_a_gate_weight_that_rounds_to_nothing_has_a_gradient(specialists, tmp_path):
    model = UltraFuserForCausalLM.from_specialists(specialists, fusion="probabilities", gate="constant")
    (numbers,) = model.model.fusion_gate.parameters()
    numbers.data.flatten()[0] = 200.0
    before = weights(model)
    trainer(JointTrainer, model, tmp_path, max_steps=1).train()
    assert all(tensor.isfinite().all() for tensor in weights(model).values())
    assert changed(model, before)


# ---- other ways to lay out a batch


def seen_sums(stage, row):
    return {int(part.split("+")[0]) for part in stage.processing_class.decode(row).split("<user>")[1:]}


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packing_keeps_domains_apart(strategy, fused, tmp_path):
    sizes = {"text": 9, "code": 7, "math": 12}
    settings = {"packing": True, "packing_strategy": strategy, "max_length": 96, "per_device_train_batch_size": 3}
    stage = trainer(GateTrainer, fused, tmp_path, sums(sizes), examples_per_domain=1, **settings)
    assert len(stage.train_dataset) < 28
    own = {"text": range(9), "code": range(9, 16), "math": range(16, 28)}
    found = {name: set() for name in own}
    for row in stage.train_dataset:
        if strategy == "bfd":  # the other strategy cuts in the middle of a sum
            found[row["domain"]] |= seen_sums(stage, row["input_ids"])
    if strategy == "bfd":
        assert found == {name: set(numbers) for name, numbers in own.items()}
    stage.train()
    assert all(entry[f"tokens/{name}"] for entry in logs(stage) for name in own)


@pytest.mark.e2e
@BOTH
def test_without_padding_everything_is_as_with_it(stage, fused, tmp_path):
    found = []
    for settings in ({}, {"padding_free": True, "max_length": None}):
        data = sums({"text": 9, "code": 7, "math": 12})
        run = trainer(stage, copy.deepcopy(fused), tmp_path, data, optim="sgd", **TERMS, **settings)
        run.train()
        ours = ("loss", "gate", "top1", "tokens", "mix")
        found.append([{k: v for k, v in entry.items() if k.startswith(ours)} for entry in logs(run)])
    for padded, free in zip(*found, strict=True):
        assert padded == pytest.approx(free, abs=1e-4)


@pytest.mark.parametrize("labelled", [True, False])
def test_evaluation_is_trls_own(labelled, fused, tmp_path):
    extra = {"domain": "text"} if labelled else {}
    held_out = Dataset.from_list([{**row, **extra} for row in conversations(5)])
    settings = {"eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.0}
    stage = trainer(GateTrainer, fused, tmp_path, more={"eval_dataset": held_out}, **settings)
    stage.train()
    found = [entry["eval_loss"] for entry in stage.state.log_history if "eval_loss" in entry]
    rows = [{k: v for k, v in row.items() if k != "domain"} for row in stage.eval_dataset]
    batch = stage.data_collator(rows)
    with torch.no_grad():
        assert found[0] == pytest.approx(fused.eval()(**batch, use_cache=False).loss.item(), rel=1e-5)
