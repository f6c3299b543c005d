"""TRL's trainers, unmodified, train a fused model: to them it is an ordinary causal language model."""

import copy
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.gates_ultrafuser import DEFAULT_GATE
from tests.support.conversations import CHAT_TEMPLATE, changed, conversations, sft, sft_trainer, weights
from tests.support.fusions import MIXTURES
from tests.support.tiny import specialist, stir_gate, tokenizer


LOAD_WITHOUT_OUR_PACKAGES = """
import sys
for name in ("modeling_ultrafuser", "trainers", "ultrafuser"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
torch.save(model(torch.arange(3, 20)[None]).logits.detach(), sys.argv[2])
"""


@pytest.fixture
def soft_capped():
    """A pair whose logits are bounded after mixing, tightly enough to feel it."""
    pair = {name: specialist("gemma2", layers=n, final_logit_softcapping=3.0) for name, n in (("a", 2), ("b", 3))}
    model = UltraFuserForCausalLM.from_specialists(pair)
    stir_gate(model)
    return model


def gate_only(model):
    model.requires_grad_(False)
    model.model.fusion_gate.requires_grad_(True)
    return model


def run_python(*arguments, folder):
    """A process that knows nothing of this repository."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(folder / "modules")}
    result = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("kind", ["fused", "soft_capped"])
@pytest.mark.parametrize("num_items_in_batch", [None, 17])
def test_the_loss_of_the_fused_head_is_the_models_own(kind, num_items_in_batch, request, tmp_path):
    model = request.getfixturevalue(kind)
    trainer = sft_trainer(model, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    assert not batch["attention_mask"].all()
    batch["labels"][:, :9] = -100  # as if only the answers were trained
    own = model.eval()(**batch, num_items_in_batch=num_items_in_batch)
    theirs = model(**batch, num_items_in_batch=num_items_in_batch, fused_lm_head=True)
    if kind == "soft_capped":
        assert 2.5 < own.logits.abs().max() <= 3
    torch.testing.assert_close(own.loss, theirs.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["fused", "soft_capped"])
def test_the_gradients_of_the_fused_head_are_the_models_own(kind, request, tmp_path):
    model = request.getfixturevalue(kind)
    trainer = sft_trainer(model, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    gradients = []
    for settings in ({}, {"fused_lm_head": True}):
        model.zero_grad()
        model(**batch, **settings).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("gate", "dtype"), [("mlp", torch.float32), (DEFAULT_GATE, torch.float64)])
@pytest.mark.parametrize("fusion", MIXTURES)
def test_gradients_are_those_of_the_formula(fusion, gate, dtype, specialists):
    model = UltraFuserForCausalLM.from_specialists(specialists, gate=gate, fusion=fusion, dtype=dtype)
    stir_gate(model)
    ids = torch.randint(3, 99, (2, 12))

    hidden = [backbone(ids).last_hidden_state for backbone in model.model.specialists.values()]
    shares, scales = model.model.fusion_gate(hidden)
    scales = torch.ones_like(shares) if scales is None else scales.expand_as(shares)
    assert (scales != 1).any() == (gate == DEFAULT_GATE)
    heads = model.lm_head.weight.split([h.shape[-1] for h in hidden], dim=1)
    own = [scale[..., None] * (h @ head.T) for scale, h, head in zip(scales.unbind(-1), hidden, heads, strict=True)]
    if fusion == "probabilities":
        own = [words.softmax(-1) for words in own]
    total = sum(share[..., None] * words for share, words in zip(shares.unbind(-1), own, strict=True))
    predicted = (total.log() if fusion == "probabilities" else total.log_softmax(-1))[:, :-1]
    losses = [-predicted.gather(-1, ids[:, 1:, None]).mean(), model(ids, labels=ids).loss]

    torch.testing.assert_close(*(loss.double() for loss in losses), rtol=1.3e-6, atol=1e-5)
    by_formula, by_model = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    torch.testing.assert_close(by_model, by_formula, rtol=1e-4, atol=1e-6)


def test_full_training_moves_every_part_and_lowers_the_loss(fused, tmp_path):
    before = weights(fused)
    losses = sft(fused, tmp_path, max_steps=8)
    assert changed(fused, before) == set(before)
    assert sum(losses[-2:]) < sum(losses[:2])


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gate_only_training_moves_the_gate_and_nothing_else(gradient_checkpointing, fused, tmp_path):
    before = weights(fused)
    sft(gate_only(fused), tmp_path, gradient_checkpointing=gradient_checkpointing)
    gate = {name for name in before if name.startswith("model.fusion_gate.")}
    # a bias that all scores share cannot matter to a softmax over them
    assert changed(fused, before) == gate


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gate_only_training_stores_no_activations_of_specialists(gradient_checkpointing, fused, tmp_path):
    states = []
    for backbone in fused.model.specialists.values():
        backbone.register_forward_hook(lambda module, args, output: states.append(output.last_hidden_state))
    # gradient checkpointing, TRL's default, makes embeddings ask for a gradient although nothing behind them does
    sft(gate_only(fused), tmp_path, max_steps=1, gradient_checkpointing=gradient_checkpointing)
    assert len(states) == 3
    assert not any(s.requires_grad for s in states)


def test_eight_small_batches_take_the_same_step_as_one_large_batch(fused, tmp_path):
    twin, before = copy.deepcopy(fused), weights(fused)
    # SGD: Adam divides by the gradient's size, which turns rounding of a zero gradient into a whole step
    settings = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1}
    sft(fused, tmp_path, per_device_train_batch_size=8, **settings)
    sft(twin, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8, **settings)
    torch.testing.assert_close(weights(twin), weights(fused), rtol=1e-4, atol=1e-6)
    assert changed(fused, before) >= set(before)


def test_gradient_checkpointing_changes_memory_and_not_the_losses(fused, tmp_path):
    twin = copy.deepcopy(fused)
    runs = {}
    for model, on in ((fused, False), (twin, True)):
        forwards = []
        for backbone in model.model.specialists.values():
            backbone.layers[0].mlp.register_forward_pre_hook(lambda *_, forwards=forwards: forwards.append(1))
        runs[on] = sft(model, tmp_path, max_steps=4, gradient_checkpointing=on), len(forwards)
    assert runs[True][0] == pytest.approx(runs[False][0], rel=1e-6)
    # each first layer ran again on the way back
    assert runs[True][1] == 2 * runs[False][1]
    torch.testing.assert_close(weights(twin), weights(fused), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", ["gate", "joint"])
def test_a_resumed_run_ends_bit_by_bit_where_an_uninterrupted_one_does(stage, tmp_path):
    specialists = {"text": specialist(attention_dropout=0.3), "code": specialist(layers=3, attention_dropout=0.3)}
    straight = UltraFuserForCausalLM.from_specialists(specialists)
    stir_gate(straight)
    resumed = copy.deepcopy(straight)
    stir_gate(resumed)  # other weights: the right ones must come from the checkpoint
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    if stage == "gate":
        gate_only(straight), gate_only(resumed)
        settings["gradient_checkpointing"] = False

    losses = sft(straight, tmp_path, **settings)
    torch.manual_seed(7)  # dropout must go on from where it was, not from here
    trainer = sft_trainer(resumed, tmp_path / "again", **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    assert changed(resumed, weights(straight)) == set()
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == losses


@pytest.mark.process
def test_a_checkpoint_of_the_trainer_loads_where_our_packages_are_not_installed(fused, tmp_path):
    sft(fused, tmp_path, save_strategy="steps", save_steps=3)
    checkpoint = tmp_path / "checkpoint-3"
    config = json.loads((checkpoint / "config.json").read_text())
    classes = {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"}
    assert set(config["auto_map"]) == classes
    for reference in config["auto_map"].values():
        module, _, name = reference.partition(".")
        assert re.search(rf"^class {name}\b", (checkpoint / f"{module}.py").read_text(), re.MULTILINE)
    run_python("-c", LOAD_WITHOUT_OUR_PACKAGES, checkpoint, tmp_path / "logits.pt", folder=tmp_path)
    expected = fused.eval()(torch.arange(3, 20)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=0)


def test_documents_packed_into_one_row_do_not_see_each_other(fused, tmp_path):
    trainer = sft_trainer(fused.eval(), tmp_path, padding_free=True, max_length=None)
    examples = [trainer.train_dataset[i] for i in range(3)]
    batch = trainer.data_collator(examples)
    assert batch["input_ids"].shape[0] == 1
    packed = fused(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
    alone = [fused(torch.tensor(e["input_ids"])[None]).logits[0] for e in examples]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.fixture
def mixture(specialists):
    model = UltraFuserForCausalLM.from_specialists(specialists, fusion="probabilities")
    stir_gate(model)
    return model


def test_stock_trl_stops_in_words_where_it_would_train_a_wrong_loss(mixture, tmp_path):
    with pytest.raises(AttributeError, match="Train with fusion='logits', or with a trainer that calls the model's"):
        sft(mixture, tmp_path)


def test_the_words_follow_a_mixture_into_peft(mixture, tmp_path):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    with pytest.raises(AttributeError, match="Train with fusion='logits'"):
        sft(mixture, tmp_path, peft_config=lora)


def test_the_way_out_that_the_words_name_trains_a_mixture(mixture, tmp_path):
    before = weights(mixture)
    encode = tokenizer(chat_template=CHAT_TEMPLATE).apply_chat_template
    rows = [encode(c["messages"], return_dict=False)[:12] for c in conversations()]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, learning_rate=1e-2, logging_steps=1, report_to="none", use_cpu=True
    )
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    trainer = Trainer(model=mixture, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert changed(mixture, before) >= set(before)


def test_the_backbone_of_a_mixture_names_what_it_has(mixture):
    output = mixture.model(torch.arange(3, 20)[None])
    assert output.specialist_hidden_states.shape == (1, 17, mixture.config.hidden_size)
    assert output[0] is output.specialist_hidden_states
    assert not hasattr(output, "last_hidden_state")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_the_command_line_of_trl_trains_a_saved_folder(lora, fused, tmp_path):
    fused.save_pretrained(tmp_path / "fused")
    tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(tmp_path / "fused")
    (tmp_path / "data").mkdir()
    lines = [json.dumps(conversation) for conversation in conversations()]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    arguments = "--trust_remote_code --max_steps 2 --use_cpu --bf16 False --report_to none --learning_rate 0.01"
    if lora:
        arguments += " --use_peft --lora_target_modules q_proj v_proj"
    folders = ["--model_name_or_path", "fused", "--dataset_name", "data", "--output_dir", "trained"]
    run_python("-m", "trl.scripts.sft", *folders, *arguments.split(), folder=tmp_path)
    if lora:
        assert (tmp_path / "trained" / "adapter_model.safetensors").exists()
    else:
        trained = UltraFuserForCausalLM.from_pretrained(tmp_path / "trained")
        assert changed(trained, weights(fused)) >= set(weights(fused))


STEPS = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
ALONE = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False}


def test_stock_dpo_tunes_a_fused_model_with_its_copy_as_reference(fused, tmp_path):
    rows = [{"prompt": f"{i}+{i}?", "chosen": f" {2 * i}", "rejected": " no idea"} for i in range(8)]
    reference = copy.deepcopy(fused)
    trainer = DPOTrainer(
        model=fused,
        ref_model=reference,
        args=DPOConfig(str(tmp_path), **STEPS, **ALONE),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(chat_template=CHAT_TEMPLATE),
    )
    before = weights(fused)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # model and reference agree before the first step, so neither answer is preferred
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[1] < losses[0]
    assert {n.split(".")[1] for n in changed(fused, before)} >= {"fusion_gate", "specialists"}


def test_stock_grpo_tunes_a_fused_model_on_rewards(fused, tmp_path):
    trainer = GRPOTrainer(
        model=fused,
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=GRPOConfig(
            str(tmp_path), **STEPS, **ALONE, num_generations=4, max_completion_length=8, gradient_checkpointing=False
        ),
        train_dataset=Dataset.from_list([{"prompt": f"{i}+{i}?"} for i in range(8)]),
        processing_class=tokenizer(chat_template=CHAT_TEMPLATE),
    )
    before = weights(fused)
    trainer.train()
    assert {n.split(".")[1] for n in changed(fused, before)} >= {"fusion_gate", "specialists"}
