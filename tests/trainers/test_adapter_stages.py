"""Both stages of training on adapters of one base."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from modeling_ultrafuser.gates_ultrafuser import DEFAULT_GATE
from tests.support.adapted import ADAPTERS, make, pair
from tests.support.conversations import CHAT_TEMPLATE, PAPER, changed, conversations, sft_trainer, weights
from tests.support.fusions import MIXTURES
from tests.support.mixes import prompt
from tests.support.tiny import tokenizer
from trainers import GateStageConfig, GateTrainer, JointStageConfig, JointTrainer
from trainers.gate_cache import CachedGateTrainer
from trainers.heads import head_of


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def models(sources):
    return pair(sources)


@pytest.fixture(scope="module")
def with_ends(tmp_path_factory):
    return make(tmp_path_factory.mktemp("ends"), ends=True)


# ---------------------------------------------------------------------------------------------- training


DATA = {name: Dataset.from_list(conversations(8)) for name in ADAPTERS}


SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 6,
    "examples_per_domain": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


def trained(model, folder, kind=GateTrainer, config=GateStageConfig, *, cache=None, peft_config=None, **settings):
    args = config(str(folder), **PAPER | SETTINGS | settings)
    extra = {} if cache is None else {"cache": folder / "cache"}
    extra |= {} if peft_config is None else {"peft_config": peft_config}
    words = tokenizer(chat_template=CHAT_TEMPLATE)
    trainer = kind(model, args, DATA, processing_class=words, **extra)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trls_loss_is_the_models_own(models, tmp_path):
    trainer = sft_trainer(models[0], tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model.train(), dict(batch))
    own = models[0](**batch).loss
    torch.testing.assert_close(theirs, own, rtol=1e-5, atol=1e-6)


@pytest.mark.e2e
@pytest.mark.parametrize("fusion", MIXTURES)
def test_stage_one_trains_the_gate_alone_and_as_on_merged_specialists(fusion, sources, tmp_path):
    adapted, merged = pair(sources, fusion=fusion)
    before = weights(adapted)
    losses = [trained(model, tmp_path / str(i)) for i, model in enumerate((adapted, merged))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert changed(adapted, before) == {n for n in before if "fusion_gate" in n}
    for own, other in zip(*(m.model.fusion_gate.parameters() for m in (adapted, merged)), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)


@pytest.mark.e2e
@pytest.mark.grid
@pytest.mark.parametrize(
    ("gate", "fusion", "keep"),
    [
        ("mlp", "logits", "hidden"),
        ("mlp", "logits", "top"),
        ("mlp", "probabilities", "log_probs"),
        (DEFAULT_GATE, "logits", "hidden"),
        (DEFAULT_GATE, "probabilities", "hidden"),
    ],
)
def test_a_cache_gives_the_losses_of_stage_one(gate, fusion, keep, sources, tmp_path):
    plain, cached = (pair(sources, gate=gate, fusion=fusion)[0] for _ in range(2))
    cached.load_state_dict(plain.state_dict())
    losses = trained(plain, tmp_path / "plain")
    # of a vocabulary as small as this the likeliest tokens are all tokens
    kept = trained(cached, tmp_path / "cached", kind=lambda *a, **k: CachedGateTrainer(*a, keep=keep, **k), cache=True)
    assert kept == pytest.approx(losses, rel=1e-2 if keep == "top" else 1e-4)


@pytest.mark.e2e
@pytest.mark.parametrize("fusion", MIXTURES)
def test_stage_one_and_its_cache_read_a_head_with_adapters(fusion, with_ends, tmp_path):
    adapted, merged = pair(with_ends, fusion=fusion)
    cached = pair(with_ends, fusion=fusion)[0]
    cached.load_state_dict(adapted.state_dict())
    losses = [trained(model, tmp_path / str(i)) for i, model in enumerate((adapted, merged))]
    kept = trained(cached, tmp_path / "cached", kind=CachedGateTrainer, cache=True)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert kept == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.e2e
def test_stage_two_trains_the_adapters_on_an_embedding_and_leaves_those_on_the_head(with_ends, tmp_path):
    fused = pair(with_ends)[0]
    before = weights(fused)
    trained(fused, tmp_path, JointTrainer, JointStageConfig, train_specialists=["math"], weight_decay=0.1)
    moved = changed(fused, before)
    assert moved == {n for n in before if "fusion_gate" in n or ("lora_" in n and "adapted_head" not in n)}
    table = "model.specialists.base.embed_tokens.lora_A"
    assert torch.equal(fused.state_dict()[table][:2], before[table][:2])


@pytest.mark.parametrize("fusion", MIXTURES)
def test_stage_two_trains_adapters_and_gate(fusion, sources, tmp_path):
    fused = pair(sources, fusion=fusion)[0]
    before = weights(fused)
    trained(fused, tmp_path, JointTrainer, JointStageConfig)
    assert changed(fused, before) == {n for n in before if "fusion_gate" in n or "lora_" in n}


@pytest.mark.e2e
def test_specialists_that_are_not_trained_keep_their_adapters(models, tmp_path):
    fused = models[0]
    before = weights(fused)
    trained(
        fused,
        tmp_path,
        JointTrainer,
        JointStageConfig,
        train_specialists=["code"],
        weight_decay=0.1,
        mix_reward="regret",
    )
    after = {n: t for n, t in fused.state_dict().items() if "lora_" in n}
    assert all(torch.equal(t[[0, 2]], before[n][[0, 2]]) for n, t in after.items())
    assert any(not torch.equal(t[1], before[n][1]) for n, t in after.items())


def test_what_an_adapter_does_not_touch_stays_untouched_in_training(models, tmp_path):
    trained(models[0], tmp_path, JointTrainer, JointStageConfig)
    layers = dict(models[0].model.specialists["base"].named_modules())
    # "code" has no adapter on the MLP, and rank 2 of the 6 that there is room for
    assert not layers["layers.0.mlp.up_proj"].lora_A[1].any()
    assert not layers["layers.0.mlp.up_proj"].lora_B[1].any()
    assert layers["layers.0.self_attn.q_proj"].lora_A[1, :2].any()
    assert not layers["layers.0.self_attn.q_proj"].lora_A[1, 2:].any()


@pytest.mark.parametrize("extra", ["peft_config", "one_specialist_at_a_time"])
def test_stage_two_of_adapters_takes_no_second_way_to_train(extra, models, tmp_path):
    options = {extra: LoraConfig(target_modules=["q_proj"]) if extra == "peft_config" else True}
    with pytest.raises(ValueError, match=f"adapters of one base.*`{extra}`.*Leave it out"):
        trained(models[0], tmp_path, JointTrainer, JointStageConfig, **options)


@pytest.mark.parametrize("fusion", MIXTURES)
def test_scores_in_chunks_have_the_gradients_of_the_models_own_loss(fusion, sources):
    fused = pair(sources, fusion=fusion, dtype=torch.float64)[0]
    ids = prompt()
    parameters = [fused.lm_head.weight, fused.model.fusion_gate.score_weight]
    own = torch.autograd.grad(fused(ids, labels=ids).loss, parameters)
    outputs = fused.model(ids, use_cache=False)
    states, shares = outputs[0][:, :-1].flatten(0, 1), outputs.gate_weights[:, :-1].flatten(0, 1)
    scores, *_ = head_of(fused.config).score(states, shares, fused.lm_head.weight, ids[:, 1:].flatten(), chunk=5)
    chunked = torch.autograd.grad(-scores.mean(), parameters)
    for one, other in zip(chunked, own, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
