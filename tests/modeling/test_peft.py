"""LoRA on specialists, with the gate trained in full beside it, through PEFT and TRL as they are."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import sft_trainer
from tests.support.tiny import stir_gate
from tests.support.versions import needs_peft_in_the_library


IDS = torch.arange(3, 35)[None]
ONE_SPECIALIST = r".*specialists\.code\..*\.(q_proj|v_proj)"

LOAD_WITHOUT_OUR_PACKAGES = """
import sys
for name in ("modeling_ultrafuser", "trainers", "ultrafuser"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids = torch.arange(3, 35)[None]
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert not info["missing_keys"], info
    torch.save(model(ids).logits.detach(), folder + "/logits.pt")
"""


def lora(target_modules=("q_proj", "v_proj"), **settings):
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    return LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=targets, **{"modules_to_save": ["fusion_gate"], **settings}
    )


@pytest.fixture
def trained(fused, tmp_path):
    """A fused model with adapters and a gate that stock SFT has moved."""
    return train(fused, tmp_path / "run", lora())


def train(model, folder, config, **settings):
    trainer = sft_trainer(model, folder, peft_config=config, **settings)
    trainer.train()
    return trainer.model.eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_a_fresh_adapter_changes_nothing(fused):
    expected = logits(copy.deepcopy(fused))
    assert torch.equal(logits(get_peft_model(fused, lora())), expected)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_adapters_and_gate_move_and_nothing_else(gradient_checkpointing, fused, tmp_path):
    original = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
    expected = logits(copy.deepcopy(fused))
    model = train(fused, tmp_path, lora(), gradient_checkpointing=gradient_checkpointing)

    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len({n for n in trainable if "lora_" in n}) == 2 * 2 * (2 + 3 + 4)
    assert all("lora_" in n or "fusion_gate.modules_to_save" in n for n in trainable)
    for name, tensor in model.get_base_model().state_dict().items():
        if "lora_B" in name:
            assert tensor.any(), name  # they start at zero
        elif "lora_" not in name and "modules_to_save" not in name:
            plain = name.replace(".base_layer", "").replace(".original_module", "")
            assert torch.equal(tensor, original[plain]), name
    gate = model.get_base_model().model.fusion_gate.modules_to_save["default"]
    assert gate.score_weight.dtype == torch.float32
    assert not torch.equal(gate.score_weight, original["model.fusion_gate.score_weight"])
    assert (logits(model) - expected).abs().max() > 0.1


def test_an_adapter_on_one_specialist_leaves_the_others_alone(fused, tmp_path):
    model = train(fused, tmp_path, lora(ONE_SPECIALIST))
    adapted = {name for name, p in model.named_parameters() if "lora_" in name}
    assert len(adapted) == 2 * 2 * 3
    assert all("specialists.code." in name for name in adapted)
    # the others need no gradient, so they run without one
    states = {}
    for name, specialist in model.get_base_model().model.specialists.items():
        specialist.register_forward_hook(lambda *call, name=name: states.update({name: call[-1].last_hidden_state}))
    model.train()(input_ids=IDS)
    assert [name for name, state in states.items() if state.requires_grad] == ["code"]
    assert list(states) == ["text", "code", "math"]


def test_ranks_can_differ_from_specialist_to_specialist(fused):
    model = get_peft_model(fused, lora(rank_pattern={r"specialists\.math\..*\.q_proj": 2}))
    adapters = [(name, p) for name, p in model.named_parameters() if "q_proj.lora_A" in name]
    ranks = {name.split("specialists.")[1].split(".")[0]: len(p) for name, p in adapters}
    assert ranks == {"text": 4, "code": 4, "math": 2}


def test_all_linear_takes_every_specialist_and_neither_head_nor_gate(fused):
    model = get_peft_model(fused, lora("all-linear"))
    adapted = {n.split(".lora_A")[0].rsplit(".", 1)[-1] for n, p in model.named_parameters() if "lora_A" in n}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_saved_adapter_on_a_fresh_base_speaks_the_same(trained, specialists, fused, tmp_path):
    trained.save_pretrained(tmp_path / "adapter")
    base = UltraFuserForCausalLM.from_specialists(specialists, gate="mlp")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(trained))


@pytest.mark.e2e
def test_an_adapter_trained_from_a_folder_loads_by_its_own_folder(fused, tmp_path):
    fused.save_pretrained(tmp_path / "fused")
    model = train(AutoModelForCausalLM.from_pretrained(tmp_path / "fused"), tmp_path / "run", lora())
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


@pytest.fixture
def precise(specialists):
    """In float64: merging reorders sums, and specialists with weights as large as these magnify the rounding."""
    model = UltraFuserForCausalLM.from_specialists(specialists, dtype=torch.float64)
    stir_gate(model)
    return model


def test_a_merged_model_speaks_the_same(precise, tmp_path):
    before = {name: tensor.clone() for name, tensor in precise.state_dict().items()}
    model = train(precise, tmp_path, lora())
    expected = logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is UltraFuserForCausalLM
    assert set(merged.state_dict()) == set(before)
    moved = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name in before if "q_proj" in name or "v_proj" in name} <= moved
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


def test_a_merged_model_still_gives_its_specialists_back(trained):
    merged = trained.merge_and_unload()
    hidden = merged.model.specialists["code"](IDS).last_hidden_state
    expected = hidden @ merged.lm_head.weight[:, 32:64].T
    torch.testing.assert_close(merged.specialist("code")(IDS).logits, expected)


def test_tokens_are_the_same_with_and_without_a_cache(trained):
    settings = {"input_ids": IDS[:, :9], "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(trained.generate(**settings), trained.generate(**settings, use_cache=False))


@needs_peft_in_the_library
def test_adapters_of_the_library_itself_switch_on_and_off(fused):
    expected = logits(copy.deepcopy(fused))
    fused.add_adapter(lora(modules_to_save=None, init_lora_weights=False))
    assert not torch.allclose(logits(fused), expected)
    fused.disable_adapters()
    assert torch.equal(logits(fused), expected)


@pytest.mark.slow
def test_adapter_and_merged_folder_load_where_our_packages_are_not_installed(precise, tmp_path):
    precise.save_pretrained(tmp_path / "fused")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    model = train(base, tmp_path / "run", lora())
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")

    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    folders = [str(tmp_path / "merged"), str(tmp_path / "adapter")]
    command = [sys.executable, "-c", LOAD_WITHOUT_OUR_PACKAGES, *folders]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    torch.testing.assert_close(torch.load(tmp_path / "merged" / "logits.pt"), expected, rtol=0, atol=1e-5)
    assert torch.equal(torch.load(tmp_path / "adapter" / "logits.pt"), expected)
