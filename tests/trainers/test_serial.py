"""Stage two with one specialist at a time: the same training, in less memory."""

import pytest
import torch
from peft import LoraConfig

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import changed, weights
from tests.support.stages import logs, trainer
from tests.support.tiny import specialist, stir_gate
from trainers import JointStageConfig, JointTrainer


SETTINGS = {
    "in one batch": {},
    "in three batches": {"per_device_train_batch_size": 2},
    "of probabilities": {"fusion": "probabilities", "per_device_train_batch_size": 2},
    "of probabilities, with terms": {"fusion": "probabilities", "gate_entropy": 0.1, "lora": True},
    "without layer checkpointing": {"gradient_checkpointing": False, "per_device_train_batch_size": 3},
    "sgd": {"optim": "sgd", "per_device_train_batch_size": 3},
    "terms of the gate": {"gate_entropy": 0.1, "gate_balance": 0.2, "gate_domain": 0.1},
    "a learned mix": {"mix_reward": "regret", "mix_every": 1, "mix_importance": True},
    "rates of their own": {"gate_learning_rate": 0.1, "head_learning_rate": 0.001, "weight_decay": 0.1},
    "one specialist": {"train_specialists": ["code"], "weight_decay": 0.1},
    "lora": {"lora": True, "per_device_train_batch_size": 2},
    "bfloat16": {"bf16": True, "per_device_train_batch_size": 2},
}


def stage(folder, *, fusion="logits", lora=False, one_at_a_time=True, **settings):
    """A run of stage two on specialists with dropout. The gradient's norm is bounded only where a test says so."""
    torch.manual_seed(0)
    specialists = {
        "text": specialist(layers=2, attention_dropout=0.1),
        "code": specialist(layers=3, attention_dropout=0.1, tied=True),
        "math": specialist(layers=1, hidden_size=48),
    }
    dtype = torch.float32 if settings.get("bf16") or lora else torch.float64
    model = UltraFuserForCausalLM.from_specialists(specialists, fusion=fusion, dtype=dtype)
    stir_gate(model)
    adapter = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]) if lora else None
    settings = {"max_steps": 2, "max_grad_norm": 0, "one_specialist_at_a_time": one_at_a_time, **settings}
    return trainer(JointTrainer, model, folder, more={"peft_config": adapter}, **settings)


@pytest.mark.e2e
@pytest.mark.grid
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_it_trains_as_all_at_once_does(settings, tmp_path):
    plain = stage(tmp_path, one_at_a_time=False, **settings)
    before = weights(plain.model)
    plain.train()
    serial = stage(tmp_path, **settings)
    serial.train()
    assert changed(plain.model, before)
    assert changed(serial.model, weights(plain.model)) == set()
    for one, other in zip(logs(serial), logs(plain), strict=True):
        assert one.pop("grad_norm") == pytest.approx(other.pop("grad_norm"), rel=1e-5)
        assert one == other


def test_no_two_specialists_have_activations_or_gradients_at_once(tmp_path):
    run = stage(tmp_path, per_device_train_batch_size=3, max_steps=1)
    seen, specialists = [], run.fused.model.specialists

    def look(name):
        others = [n for n, s in specialists.items() if n != name and any(p.grad is not None for p in s.parameters())]
        seen.append((name, torch.is_grad_enabled(), others))

    for name, one in specialists.items():
        one.embed_tokens.register_forward_pre_hook(lambda *_, name=name: look(name))
    run.train()
    # two micro-batches: all specialists without autograd, twice; then each with it, twice
    forth = [(name, False, []) for name in specialists]
    back = [(name, True, []) for name in specialists for _ in range(2)]
    assert seen == [*forth, *forth, *back]
    assert all(p.grad is None for p in run.model.parameters())


@pytest.mark.e2e
def test_an_interrupted_run_ends_where_an_uninterrupted_one_ends(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 3}
    whole, rest = stage(tmp_path, **settings), stage(tmp_path / "again", **settings)
    whole.train()
    rest.train(str(tmp_path / "checkpoint-2"))
    assert changed(rest.model, weights(whole.model)) == set()


@pytest.mark.e2e
def test_it_goes_on_from_a_checkpoint_of_all_at_once(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 3}
    whole, rest = stage(tmp_path, one_at_a_time=False, **settings), stage(tmp_path / "again", **settings)
    whole.train()
    rest.train(str(tmp_path / "checkpoint-2"))
    assert changed(rest.model, weights(whole.model)) == set()


def test_each_part_has_a_largest_gradient_norm_of_its_own(tmp_path):
    run = stage(tmp_path, optim="sgd", max_grad_norm=1e-3, max_steps=1, learning_rate=0.5)
    before = weights(run.model)
    run.train()
    squares = {}
    for name, tensor in run.model.state_dict().items():
        part = name.split(".")[2] if ".specialists." in name else "others"
        squares[part] = squares.get(part, 0) + (tensor - before[name]).square().sum().item()
    moved = {part: s**0.5 for part, s in squares.items()}
    assert moved == pytest.approx(dict.fromkeys(("text", "code", "math", "others"), 0.5e-3), rel=1e-2)
    assert logs(run)[0]["grad_norm"] > 1


def test_the_model_is_left_as_it_was(tmp_path):
    run = stage(tmp_path)
    run.train()
    assert not any("forward" in vars(s) for s in run.fused.model.specialists.values())
    run.fused.train()(torch.arange(3, 9)[None]).logits.sum().backward()
    assert all(p.grad is not None for p in run.fused.model.specialists["text"].layers.parameters())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"fp16": True}, "'fp16': True"),
        ({"activation_offloading": True}, "'activation_offloading': True"),
        ({"optim": "schedule_free_adamw"}, "'optim': 'schedule_free_adamw'"),
    ],
)
def test_settings_that_need_one_backward_pass_are_refused(settings, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        JointStageConfig(str(tmp_path), use_cpu=True, one_specialist_at_a_time=True, **{"bf16": False, **settings})


def test_a_parameter_of_two_specialists_is_refused(tmp_path):
    model = UltraFuserForCausalLM.from_specialists({"text": specialist(), "code": specialist()})
    both = model.model.specialists
    both["code"].layers[0] = both["text"].layers[0]
    with pytest.raises(ValueError, match="no parameter that is trained may belong to two"):
        trainer(JointTrainer, model, tmp_path, one_specialist_at_a_time=True)
