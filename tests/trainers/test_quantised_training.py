"""Training with fewer bits per parameter: 8-bit optimizers, and LoRA beside 4-bit specialists (QLoRA)."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import changed, weights
from tests.support.stages import domains, logs, trainer
from tests.support.tiny import specialist, stir_gate
from trainers import GateTrainer, JointTrainer


IDS = torch.arange(3, 35)[None]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


def save(folder, **choices):
    """A fused model whose layers are wide enough for blocks of 64 numbers, which 4-bit weights come in."""
    specialists = {"text": specialist(hidden_size=64), "code": specialist(layers=1, hidden_size=64)}
    model = UltraFuserForCausalLM.from_specialists(specialists, **choices)
    stir_gate(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "fused")


def in_4_bits(folder, **settings):
    pytest.importorskip("bitsandbytes")
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**NF4, **settings))


def in_8_bits(folder, **settings):
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig(), **settings)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


QUANTISED = pytest.mark.parametrize("load", [in_4_bits, in_8_bits])


def stage_two(model, folder, **settings):
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    settings = {"max_grad_norm": 0, "per_device_train_batch_size": 2, **settings}
    return trainer(JointTrainer, model, folder, rows(model), more={"peft_config": adapter}, **settings)


def rows(model):

    return domains(dict.fromkeys(model.config.specialist_names, 6))


@torch.no_grad()
def predictions(model):
    return model.eval()(input_ids=IDS).logits.softmax(-1)


@QUANTISED
def test_specialists_are_quantised_and_head_and_gate_are_not(load, folder):
    plain, model = AutoModelForCausalLM.from_pretrained(folder), load(folder)
    for name, module in model.named_modules():
        if (
            type(module).__module__.startswith("bitsandbytes")
            or "torchao" in type(getattr(module, "weight", 0)).__module__
        ):
            assert ".layers." in name
    linear = model.model.specialists["code"].layers[0].self_attn.q_proj.weight
    assert linear.dtype == torch.uint8 or type(linear).__name__ == "Int8Tensor"
    assert model.lm_head.weight.equal(plain.lm_head.weight)
    for parameter, own in zip(model.model.fusion_gate.parameters(), plain.model.fusion_gate.parameters(), strict=True):
        assert parameter.dtype == torch.float32
        assert parameter.equal(own)


def test_eight_bits_predict_nearly_the_same(tmp_path):
    # random weights of the default gate turn what is rounding into another specialist
    folder = save(tmp_path, gate="mlp")
    assert (
        predictions(in_8_bits(folder)) - predictions(AutoModelForCausalLM.from_pretrained(folder))
    ).abs().max() < 0.05


@QUANTISED
def test_a_quantised_model_and_its_specialists_load_again_from_their_folders(load, folder, tmp_path):
    model = load(folder)
    model.save_pretrained(tmp_path / "again")
    assert predictions(AutoModelForCausalLM.from_pretrained(tmp_path / "again")).equal(predictions(model))
    own = model.specialist("code")
    own.save_pretrained(tmp_path / "code")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "code")
    assert type(stock).__name__ == "LlamaForCausalLM"
    assert predictions(stock).equal(predictions(own))


@pytest.mark.parametrize(
    ("load", "setting"), [(in_4_bits, "llm_int8_skip_modules"), (in_8_bits, "modules_to_not_convert")]
)
def test_a_list_of_modules_to_leave_alone_must_name_the_head(load, setting, folder, tmp_path):
    rest = ["model.specialists.text"]
    with pytest.raises(ValueError, match="The head of a fused model must have plain weights"):
        load(folder, **{setting: rest})
    model = load(folder, **{setting: [*rest, "lm_head"]})
    assert model.model.specialists["text"].layers[0].self_attn.q_proj.weight.dtype == torch.float32
    own = model.specialist("text")
    own.save_pretrained(tmp_path / "text")
    assert not hasattr(own.config, "quantization_config")
    assert predictions(AutoModelForCausalLM.from_pretrained(tmp_path / "text")).equal(predictions(own))


@pytest.mark.e2e
@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_adapters_and_a_gate_in_float32_learn_beside_four_bits(one_at_a_time, folder, tmp_path):
    model = in_4_bits(folder)
    gate = {name: tensor.clone() for name, tensor in model.model.fusion_gate.state_dict().items()}
    run = stage_two(model, tmp_path / "run", one_specialist_at_a_time=one_at_a_time)
    learned = run.fused.model.fusion_gate.modules_to_save["default"]
    for name, parameter in learned.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.equal(gate[name])
    before = weights(run.model)
    run.train()
    moved = changed(run.model, before)
    assert moved == {n for n, p in run.model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "fusion_gate.modules_to_save" in n for n in moved)
    assert len({entry["loss"] for entry in logs(run)}) == 3

    run.save_model(tmp_path / "adapter")
    again = PeftModel.from_pretrained(in_4_bits(folder), tmp_path / "adapter").state_dict()
    for name, tensor in run.model.state_dict().items():
        # TRL trains adapters beside quantised weights in bfloat16, PEFT loads them as float32
        assert again[name].equal(tensor.float() if name in moved else tensor), name


@pytest.mark.e2e
def test_four_bits_one_specialist_at_a_time_train_as_all_at_once(folder, tmp_path):
    plain = stage_two(in_4_bits(folder), tmp_path / "plain")
    serial = stage_two(in_4_bits(folder), tmp_path / "serial", one_specialist_at_a_time=True)
    plain.train()
    serial.train()
    assert changed(serial.model, weights(plain.model)) == set()


@pytest.mark.grid
@QUANTISED
@pytest.mark.parametrize("stage", [GateTrainer, JointTrainer])
def test_quantised_weights_without_adapters_are_refused(stage, load, folder, tmp_path):
    model = load(folder)
    with pytest.raises(ValueError, match="learn through adapters beside them, but this model is quantised"):
        trainer(stage, model, tmp_path / "run", rows(model))


@pytest.mark.e2e
@pytest.mark.parametrize(
    "optim", ["adamw_bnb_8bit", pytest.param("adamw_torch_8bit", marks=pytest.mark.slow, id="compiled, for minutes")]
)
def test_an_optimizer_with_states_of_eight_bits_trains_and_resumes(optim, tmp_path):
    pytest.importorskip("bitsandbytes" if "bnb" in optim else "torchao")

    def run(name, **settings):
        torch.manual_seed(0)
        # states of fewer than 4096 numbers stay in 32 bits
        one = {"hidden_size": 64, "intermediate_size": 128, "layers": 1}
        model = UltraFuserForCausalLM.from_specialists({"text": specialist(**one), "code": specialist(**one)})
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "max_grad_norm": 0, **settings}
        settings |= {"optim": optim, "gate_learning_rate": 0.1, "per_device_train_batch_size": 2}
        return trainer(JointTrainer, model, tmp_path / name, rows(model), **settings)

    plain = run("plain")
    plain.train()
    states = [value for state in plain.optimizer.state_dict()["state"].values() for value in state.values()]
    assert any("8bit" in type(s).__name__ or (isinstance(s, dict) and s) for s in states)
    resumed, serial = run("resumed"), run("serial", one_specialist_at_a_time=True)
    resumed.train(str(tmp_path / "plain" / "checkpoint-2"))
    assert changed(resumed.model, weights(plain.model)) == set()
    serial.train()
    assert changed(serial.model, weights(plain.model)) == set()
