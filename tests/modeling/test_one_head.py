"""Last states, scores, heads and losses: asked of all specialists together, or refused."""

import logging

import pytest
import torch
from datasets import Dataset
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)
from trl import RewardConfig, RewardTrainer

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.checkpoints import saying
from tests.support.fusions import MIXTURES
from tests.support.tiny import specialist, stir_gate, tokenizer
from ultrafuser.decoding.drafting import self_draft
from ultrafuser.decoding.dropping import drop_specialists


IDS = torch.tensor([[5, 9, 7, 11]])


def pair(**other):
    """Two specialists; `other` is what the second has otherwise."""
    model = UltraFuserForCausalLM.from_specialists(
        {"text": specialist("llama", layers=1), "code": specialist("llama", layers=2, **other)}
    )
    stir_gate(model)
    return model


def lora(**settings):
    return LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **settings)


# ------------------------------------------------------------------------------------------- last state, and a score


@pytest.mark.parametrize("fusion", MIXTURES)
def test_the_last_of_all_hidden_states_is_what_the_head_reads(fusion, specialists):
    model = UltraFuserForCausalLM.from_specialists(specialists, fusion=fusion)
    output = model.model(IDS, output_hidden_states=True)
    assert output.hidden_states[-1].shape[-1] == model.config.hidden_size
    assert torch.equal(output.hidden_states[-1], output[0])
    assert model(IDS, output_hidden_states=[-1]).hidden_states[-1].shape[-1] == model.config.hidden_size


@pytest.fixture
def folder(fused, tmp_path):
    """A saved fused model and its tokenizer."""
    fused.config.pad_token_id = 0
    fused.save_pretrained(tmp_path / "fused")
    tokenizer().save_pretrained(tmp_path / "fused")
    return tmp_path / "fused"


def test_a_score_is_read_off_the_last_token(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    padded = torch.tensor([[5, 9, 7, 11], [5, 9, 7, 0]])
    state = model.model(padded).last_hidden_state
    expected = torch.stack([state[0, 3], state[1, 2]]) @ model.score.weight.T
    torch.testing.assert_close(model(padded).logits, expected)
    assert model.score.weight.std() > 0


def test_a_reward_model_is_trained_and_comes_back(folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    rows = Dataset.from_dict({"chosen": ["hello world"] * 4, "rejected": ["bye"] * 4})
    args = RewardConfig(
        str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False
    )
    before = model.score.weight.detach().clone()
    RewardTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer()).train()
    assert not torch.equal(model.score.weight, before)
    model.save_pretrained(tmp_path / "reward")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)


def test_a_mixture_of_probabilities_has_no_state_to_score(specialists, tmp_path):
    UltraFuserForCausalLM.from_specialists(specialists, fusion="probabilities").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=saying("read off one hidden state", "'probabilities'")):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)


# -------------------------------------------------------------------------------------------------- other trainers


def test_metrics_of_the_librarys_trainer_see_logits(fused, tmp_path):
    tok, seen = tokenizer(), []
    rows = Dataset.from_list([dict(tok(text)) for text in ["hello world", "abc"] * 2])
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    collator = DataCollatorForLanguageModeling(tok, mlm=False)
    metrics = lambda p: seen.append(p.predictions.shape) or {}  # noqa: E731
    Trainer(fused, args, eval_dataset=rows, data_collator=collator, compute_metrics=metrics).evaluate()
    assert seen == [(4, 11, 99)]


@pytest.mark.parametrize("config", [PromptTuningConfig, PromptEncoderConfig])
def test_prompt_tuning_is_refused_in_words(config):
    model = get_peft_model(pair(), config(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match=saying("embed the same token differently", "prefix tuning")):
        model(IDS)


def test_prefix_tuning_learns_and_comes_back(tmp_path):
    model = pair()
    base = pair()
    base.load_state_dict(model.state_dict())
    tuned = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).train()
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        loss = tuned(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(again.eval()(IDS).logits, tuned.eval()(IDS).logits)
    length = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(tuned.generate(input_ids=IDS, **length), again.generate(input_ids=IDS, **length))


def test_prefix_tuning_of_different_geometries_is_refused_in_words():
    tuned = get_peft_model(
        pair(num_key_value_heads=4), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    for train in (False, True):
        with pytest.raises(ValueError, match=saying("one shape for all layers", "'code'", "Use LoRA")):
            tuned.train(train)(IDS)


def test_prefix_tuning_beside_checkpointing_is_refused_in_words():
    tuned = get_peft_model(pair(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).train()
    tuned.base_model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="one with 4 tokens was given.*gradient_checkpointing=False"):
        tuned(IDS, labels=IDS)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"custom_generate": self_draft}, "prefix tuning"),
        ({"custom_generate": drop_specialists}, "prefix tuning"),
        ({"cache_implementation": "static"}, "Prefix tuning"),
    ],
)
def test_what_would_leave_a_prefix_out_is_refused(options, named):
    tuned = get_peft_model(pair(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with pytest.raises(ValueError, match=named):
        tuned.generate(input_ids=IDS, max_new_tokens=5, do_sample=False, **options)
    tuned.generate(input_ids=IDS, max_new_tokens=5, do_sample=False)
    # the model alone has no prefix
    tuned.get_base_model().generate(IDS, max_new_tokens=5, do_sample=False, **options)


HEAD_ADAPTERS = {
    "LoRA": LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]),
    "DoRA": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], use_dora=True),
    "IA3": IA3Config(task_type="CAUSAL_LM", target_modules=["lm_head"], feedforward_modules=[]),
    "tokens": LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices={"lm_head": [4], "embed_tokens": [4]}
    ),
    "tokens alone": TrainableTokensConfig(
        task_type="CAUSAL_LM", target_modules=["lm_head", "embed_tokens"], token_indices=[4]
    ),
    "a parameter": LoraConfig(task_type="CAUSAL_LM", target_modules=[], target_parameters=["lm_head.weight"]),
}


@pytest.mark.grid
@pytest.mark.parametrize("adapter", HEAD_ADAPTERS)
@pytest.mark.parametrize("choices", [{"fusion": "probabilities"}, {"gate": "posterior"}, {"gate": "evidence"}])
def test_an_adapter_on_a_head_that_is_read_in_parts_is_refused(choices, adapter, specialists):
    model = UltraFuserForCausalLM.from_specialists(specialists, **choices)
    with pytest.raises(ValueError, match="An adapter on `lm_head` .*modules_to_save"):
        get_peft_model(model, HEAD_ADAPTERS[adapter])


@pytest.mark.grid
@pytest.mark.parametrize("choices", [{}, {"fusion": "probabilities"}, {"gate": "posterior"}])
@torch.no_grad()
def test_a_head_that_is_trained_as_a_whole_is_read_in_parts_too(choices, specialists):
    model = UltraFuserForCausalLM.from_specialists(specialists, **choices)
    tuned = get_peft_model(model, lora(modules_to_save=["lm_head"])).eval()
    before = tuned(IDS)
    tuned.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    after = tuned(IDS)
    assert not torch.allclose(before.logits, after.logits)
    alone = tuned.base_model.model.specialist("code")(IDS).logits
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, after.logits)
    torch.testing.assert_close(merged(IDS).gate_weights, after.gate_weights)
    torch.testing.assert_close(merged.specialist("code")(IDS).logits, alone)


@torch.no_grad()
def test_a_specialist_is_had_back_with_an_adapter_on_the_head_once_that_is_merged(fused):
    tuned = get_peft_model(fused, LoraConfig(target_modules=["lm_head"], init_lora_weights=False)).eval()
    expected = tuned(IDS).logits
    with pytest.raises(ValueError, match=r"`specialist\('code'\)` takes the head.*merge_and_unload"):
        tuned.base_model.model.specialist("code")
    merged = tuned.merge_and_unload()
    weights = merged(IDS).gate_weights
    alone = [merged.specialist(name)(IDS).logits for name in merged.config.specialist_names]
    torch.testing.assert_close(sum(weights[..., k, None] * one for k, one in enumerate(alone)), expected)


def test_ia3_changes_every_specialist(tmp_path):
    config = IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    model = get_peft_model(pair(), config)
    trained = {n.split("specialists.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"text", "code"}


def test_what_shards_a_module_with_its_children_finds_none_in_the_one_embedding(fused):
    # FSDP gathers parameters where their module is called, and this one never is; vLLM looks through `modules()`
    embedding = fused.get_input_embeddings()
    assert list(embedding.children()) == []
    assert sum(isinstance(m, nn.Embedding) for m in embedding.modules()) == 3


# ---------------------------------------------------------------------------------------------------- losses inside


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}


def mixture(**fields):
    return UltraFuserForCausalLM.from_specialists(
        {"text": specialist("llama", layers=1), "code": specialist("mixtral", layers=1, **EXPERTS, **fields)}
    )


@pytest.mark.grid
@pytest.mark.parametrize("way", ["argument", "configuration", "a specialist's configuration"])
def test_a_loss_that_balances_experts_is_refused_and_not_left_out(way):
    model = mixture()
    if way == "configuration":
        model.config.output_router_logits = True
    elif way == "a specialist's configuration":
        model.config.code.output_router_logits = True
    argument = {"output_router_logits": True} if way == "argument" else {}
    with pytest.raises(ValueError, match="output_router_logits=True asks for that. Set it to False"):
        model(IDS, labels=IDS, **argument)


def test_a_configuration_that_asks_for_a_loss_of_experts_is_refused_before_anything_is_built():
    config = mixture().config
    config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits=True asks for that"):
        AutoModelForCausalLM.from_config(config)


def test_a_loss_that_balances_experts_can_be_done_without():
    model = mixture()
    expected = model(IDS, labels=IDS).loss
    assert torch.equal(model(IDS, labels=IDS, output_router_logits=False).loss, expected)


def test_a_specialist_that_asks_for_a_loss_of_its_experts_is_fused_without_and_told(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("modeling_ultrafuser"), "propagate", True)
    model = mixture(output_router_logits=True)
    assert "code: output_router_logits=True of its configuration is set to False" in caplog.text
    assert not model.config.code.output_router_logits
    logits = model(IDS).logits
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:])
    torch.testing.assert_close(model(IDS, labels=IDS).loss, expected)
    model.specialist("code")(IDS, labels=IDS, output_router_logits=True).aux_loss.item()
