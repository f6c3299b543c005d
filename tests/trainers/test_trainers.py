import copy
import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F  # noqa: N812
from trl import SFTConfig

import trainers.chunked
from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.gates_ultrafuser import DEFAULT_GATE
from tests.support.conversations import CHAT_TEMPLATE, changed, conversations, weights
from tests.support.stage_run import data as sums
from tests.support.stages import BOTH, batch_of, domains, logs, trainer
from tests.support.tiny import specialist, tokenizer
from trainers import DomainSampler, GateTrainer, JointTrainer
from trainers.forward_hooks import own_log_probs
from trainers.prompt_views import ViewCollator
from trainers.stage_config import scaled_rate


TERMS = {"gate_entropy": 0.1, "gate_balance": 0.2, "gate_domain": 0.1, "mix_importance": True}


@BOTH
def test_a_stage_moves_its_own_parameters_and_no_others(stage, fused, tmp_path):
    before = weights(fused)
    trainer(stage, fused, tmp_path).train()
    moved = {".".join(name.split(".")[:2]) for name in changed(fused, before)}
    everything = {"model.fusion_gate", "model.specialists", "lm_head.weight"}
    assert moved == ({"model.fusion_gate"} if stage is GateTrainer else everything)


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
    sampler = DomainSampler(["a"] * 12 + ["b"] * 4, 4)
    draws = [i for i in sampler if i >= 12]
    assert len(draws) == 8
    assert sorted(draws[:4]) == sorted(draws[4:]) == [12, 13, 14, 15]
    assert draws[:4] != draws[4:]


def test_the_next_epoch_continues_the_stream():
    one, two = DomainSampler(["a"] * 6 + ["b"] * 6, 4), DomainSampler(["a"] * 6 + ["b"] * 6, 4)
    two.set_epoch(1)
    assert sorted(one) == sorted(two) == list(range(12))
    assert list(one) != list(two)


def test_another_seed_gives_another_stream_and_the_same_seed_the_same():
    labels = ["a"] * 20 + ["b"] * 20
    assert list(DomainSampler(labels, 4, seed=0)) == list(DomainSampler(labels, 4, seed=0))
    assert list(DomainSampler(labels, 4, seed=0)) != list(DomainSampler(labels, 4, seed=1))


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


@BOTH
@pytest.mark.parametrize("terms", [{}, TERMS])
@pytest.mark.parametrize("fusion", ["logits", "probabilities"])
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


# ---- what is refused


def test_a_stage_does_not_resume_from_another(fused, tmp_path):
    trainer(GateTrainer, fused, tmp_path, save_strategy="steps", save_steps=3).train()
    with pytest.raises(ValueError, match="stage is 'gate' in .*checkpoint-3' and 'joint' here. Start a new run from"):
        trainer(JointTrainer, fused, tmp_path / "two").train(str(tmp_path / "checkpoint-3"))


def test_a_stage_does_not_resume_with_other_data(fused, tmp_path):
    trainer(GateTrainer, fused, tmp_path, save_strategy="steps", save_steps=3).train()
    stage = trainer(GateTrainer, fused, tmp_path, domains({"text": 7, "code": 6, "math": 9}))
    with pytest.raises(ValueError, match="sizes is \\[6, 9, 8\\] in .* and \\[6, 9, 7\\] here"):
        stage.train(str(tmp_path / "checkpoint-3"))


def test_a_stage_does_not_resume_from_another_trainers_checkpoint(fused, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="has no ultrafuser_stage.json: it is another trainer's, or was cut off"):
        trainer(GateTrainer, fused, tmp_path).train(str(tmp_path / "checkpoint-3"))


def test_a_stage_does_not_resume_from_a_model_alone(fused, tmp_path):
    trainer(GateTrainer, fused, tmp_path, save_strategy="steps", save_steps=3, save_only_model=True).train()
    for checkpoint in (str(tmp_path / "checkpoint-3"), True):
        with pytest.raises(ValueError, match="holds the model alone, as `save_only_model=True` asks for. Start"):
            trainer(GateTrainer, fused, tmp_path, save_only_model=True).train(checkpoint)


@BOTH
def test_another_trainers_settings_are_refused(stage, fused, tmp_path):
    with pytest.raises(ValueError, match=f"reads its settings from a {stage.config_class.__name__}, but got a SFTCo"):
        stage(fused, SFTConfig(str(tmp_path), use_cpu=True, bf16=False), domains({"text": 8}))


def test_batches_that_do_not_divide_a_step_are_refused(fused, tmp_path):
    with pytest.raises(ValueError, match="6 examples, but per_device_train_batch_size=4 .* Choose a divisor of 6"):
        trainer(GateTrainer, fused, tmp_path, per_device_train_batch_size=4)
    with pytest.raises(ValueError, match="follows from `examples_per_domain` and is 2 here, but it was set to 5"):
        trainer(GateTrainer, fused, tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=5)


def test_a_domain_that_masking_leaves_empty_is_named(fused, tmp_path):
    pairs = [{"prompt": f"{i}+{i}?", "completion": f"It is {2 * i}."} for i in range(6)]
    long = [{"prompt": pair["prompt"] * 20, "completion": pair["completion"]} for pair in pairs]
    data = {name: Dataset.from_list(rows) for name, rows in {"text": pairs, "code": long, "math": pairs}.items()}
    with pytest.raises(ValueError, match="nothing is left of \\['code'\\] once prompts are masked"):
        trainer(GateTrainer, fused, tmp_path, data, max_length=32)


def test_a_domain_whose_batches_hold_no_label_stops_the_run(fused, tmp_path):
    stage = trainer(GateTrainer, fused, tmp_path, sums({"text": 9, "code": 7, "math": 12}))
    inner = stage.data_collator.collator
    masked = {tuple(row["input_ids"]) for row in stage.train_dataset if row["domain"] == "code"}

    def collate(rows):
        batch = inner(rows)
        batch["labels"][[tuple(row["input_ids"]) in masked for row in rows]] = -100
        return batch

    stage.data_collator.collator = collate
    with pytest.raises(ValueError, match=r"since the last log \['code'\] held none: all its labels are -100"):
        stage.train()


# ---- what is watched


@BOTH
@pytest.mark.parametrize("fusion", ["logits", "probabilities"])
def test_logged_numbers_are_those_of_the_model(stage, fusion, specialists, tmp_path):
    model = UltraFuserForCausalLM.from_specialists(specialists, fusion=fusion)
    for parameter in model.model.fusion_gate.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    run = trainer(stage, model, tmp_path, sums({"text": 9, "code": 7, "math": 12}), learning_rate=0.0, max_steps=1)
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


def test_a_gate_that_does_not_move_is_told(specialists, tmp_path):
    model = UltraFuserForCausalLM.from_specialists(specialists)
    with pytest.warns(UserWarning, match="hardly moved after 21 steps.*Raise `learning_rate`"):
        trainer(GateTrainer, model, tmp_path, learning_rate=1e-8, max_steps=22).train()


# ---- gate terms


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


def test_domains_without_a_specialist_cannot_start_the_gate_warm(fused, tmp_path):
    with pytest.raises(ValueError, match="domains must be named as specialists are, but domains are \\['a', 'b'\\]"):
        trainer(GateTrainer, fused, tmp_path, domains({"a": 4, "b": 4}), gate_domain=1.0)


# ---- the loss


@BOTH
@pytest.mark.parametrize(("gate", "dtype"), [("mlp", torch.float32), (DEFAULT_GATE, torch.float64)])
@pytest.mark.parametrize("fusion", ["logits", "probabilities"])
def test_the_loss_in_chunks_is_the_models_own(fusion, gate, dtype, stage, specialists, tmp_path, monkeypatch):
    monkeypatch.setitem(trainers.chunked.CHUNK, "cpu", 5)
    model = UltraFuserForCausalLM.from_specialists(specialists, fusion=fusion, gate=gate, dtype=dtype)
    for parameter in model.model.fusion_gate.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    run = trainer(stage, model, tmp_path)
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


# ---- nothing goes wrong in silence


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"gate_domain": 1.0, "label_smoothing_factor": 0.1}, "\\['gate_domain'\\] are added to TRL's own loss"),
        ({"mix_importance": True, "loss_type": "dft"}, "loss_type='dft'"),
        ({"auto_find_batch_size": True}, "draws are counted in batches"),
        ({"mix_reward": "similarity", "packing": True}, "scores examples one by one"),
        ({"mix_reward": "loss", "mix_floor": 0.6}, "A floor is a share of the mix"),
        ({"mix_reward": "gradient", "mix_probe": 1}, "two halves of the pool"),
        ({"mix_reward": "regret", "mix_policy": "aioli"}, "follows losses as they are"),
        ({"mix_shadow": True}, "`mix_reward` is None"),
        ({"mix": "fixed", "mix_weights": {"poetry": 1}}, "the domains are \\['code', 'math', 'text'\\]"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_would_be_ignored_or_fail_later_are_refused(settings, sentence, fused, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        trainer(GateTrainer, fused, tmp_path, **settings)


def test_a_resume_with_nothing_to_resume_from_is_refused(fused, tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    stage = trainer(GateTrainer, fused, tmp_path)
    with pytest.raises(ValueError, match="no complete checkpoint of a stage"):
        stage.train(resume_from_checkpoint=True)


@BOTH
def test_a_model_with_adapters_already_is_refused(stage, fused, tmp_path):
    adapted = get_peft_model(fused, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="it adds adapters itself"):
        trainer(stage, adapted, tmp_path)


def test_a_stream_of_data_is_refused(fused, tmp_path):
    with pytest.raises(ValueError, match="got an IterableDataset"):
        trainer(GateTrainer, fused, tmp_path, {"text": Dataset.from_list(conversations()).to_iterable_dataset()})


def test_each_domain_may_come_in_a_format_of_its_own(fused, tmp_path):
    pairs = [{"prompt": f"{i}+{i}?", "completion": f" {2 * i}", "domain": "another"} for i in range(6)]
    data = {"text": Dataset.from_list(conversations(6)), "code": Dataset.from_list(pairs)}
    stage = trainer(GateTrainer, fused, tmp_path, data, examples_per_domain=3)
    stage.train()
    rows = {name: [r for r in stage.train_dataset if r["domain"] == name] for name in data}
    assert all(len(part) == 6 for part in rows.values())
    # of a completion only that is learned; of a conversation, here, everything
    assert all(-100 in row["labels"] for row in rows["code"])
    assert not any(-100 in row["labels"] for row in rows["text"])


def test_a_second_training_begins_anew(fused, tmp_path):
    settings = {"mix_reward": "loss", "mix_every": 1, "mix_delay": 1, "max_steps": 2, "learning_rate": 0.0}
    stage = trainer(GateTrainer, fused, tmp_path, **settings)
    stage.train()
    first = stage.controller.mixes
    stage.train()
    assert stage.controller.mixes == first
    assert len(first) == 3


def test_regret_reads_a_specialist_as_it_speaks_under_a_soft_cap_of_its_own(tmp_path):
    pair = {n: specialist("gemma2", layers=k, final_logit_softcapping=2.0 + k) for k, n in ((1, "text"), (2, "code"))}
    model = UltraFuserForCausalLM.from_specialists(pair, fusion="probabilities")
    stage = trainer(GateTrainer, model, tmp_path, domains({"text": 4, "code": 4}), examples_per_domain=3)
    batch = stage.data_collator([stage.train_dataset[i] for i in range(8)])
    states = [
        s(batch["input_ids"], batch["attention_mask"]).last_hidden_state for s in model.model.specialists.values()
    ]
    domain, labels = batch["domain"][:, 1:], batch["labels"]
    found = own_log_probs(model, stage.own_specialists, states, labels, domain, labels[:, 1:] != -100)
    for row in range(8):
        own = pair[stage.domains[domain[row, 0]]]
        logits = own(batch["input_ids"][row : row + 1], attention_mask=batch["attention_mask"][row : row + 1]).logits
        expected = -F.cross_entropy(logits[0, :-1], labels[row, 1:], reduction="none")
        assert torch.allclose(found[row], expected, atol=1e-5)


@BOTH
def test_every_specialist_may_read_the_prompt_in_its_own_template(stage, fused, tmp_path):
    words = tokenizer(chat_template=CHAT_TEMPLATE)
    templates = {"text": CHAT_TEMPLATE, "code": CHAT_TEMPLATE.replace("<", "[["), "math": CHAT_TEMPLATE}
    views = ViewCollator(words, templates, fused.config.specialist_names)
    unprepared = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    more = {"data_collator": views}
    run = trainer(stage, fused, tmp_path, max_steps=1, mix_reward="regret", mix_every=1, more=more, **unprepared)
    rows = [run.train_dataset[i] for i in list(run.sampler)[:6]]
    batch = views(rows)
    batch.pop("domain")
    with torch.no_grad():
        expected = fused(**batch).loss.item()
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert (run.controller.rewards > 0).all()
