"""Continuous batching gives every prompt the tokens that it gets alone, or is refused."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from tests.support.mixes import MIXES, fuse, prompt
from tests.support.tiny import specialist
from tests.support.versions import TESTED


STEPS = 6


@pytest.fixture
def specialists():
    return MIXES["one family"]()


@pytest.fixture
def fused(specialists):
    return fuse(specialists)


def generate(fused, ids, **options):
    return fused.generate(ids, **{"max_new_tokens": STEPS, "do_sample": False} | options)


# ---------------------------------------------------------------------------------------------- continuous batching


@pytest.mark.grid
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mix", ["full attention", "windows"])
def test_continuous_batching_gives_every_prompt_the_tokens_it_gets_alone(mix, attention):
    specialists = {"text": specialist("llama", layers=2), "code": specialist("llama", layers=3, tied=True)}
    if mix == "windows":
        specialists = {
            "text": specialist("mistral", sliding_window=4),
            "code": specialist("llama", layers=3),
            "math": specialist("mistral", sliding_window=4),
        }
    fused = fuse(specialists, attn_implementation=attention)
    prompts = [prompt(batch=1, length=n)[0].tolist() for n in (12, 5, 9)]
    expected = [generate(fused, torch.tensor([p]))[0, len(p) :].tolist() for p in prompts]
    config = GenerationConfig(max_new_tokens=STEPS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # the default takes most of the machine's memory
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    answers = fused.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=small)
    assert [a.generated_tokens for a in answers.values()] == expected


@pytest.mark.parametrize("mix", ["one family", "windows"])
def test_continuous_batching_of_differing_attention_geometry_is_refused(mix):
    fused = fuse(MIXES[mix]())
    with pytest.raises(ValueError, match="blocks of one shape.*Use `generate`"):
        fused.generate_batch(inputs=[[3, 4, 5]], generation_config=GenerationConfig(max_new_tokens=2))


def test_continuous_batching_of_differing_windows_is_refused():
    fused = fuse({f"window_{n}": specialist("mistral", layers=1, sliding_window=n) for n in (4, 6)})
    with pytest.raises(ValueError, match="one attention window for all.*'window_6': 6"):
        fused.generate_batch(inputs=[[3, 4, 5]], generation_config=GenerationConfig(max_new_tokens=2))


UNPAGED = {
    "bloom": {"n_head": 4, "n_layer": 2},
    "stablelm": {"num_key_value_heads": 4},
    **{"doge": {}, "nemotron": {}, "diffllama": {}},
    "deepseek_v3": {
        **{"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
        **{"head_dim": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
        **{"n_group": 1, "topk_group": 1, "moe_intermediate_size": 16},
    },
}


# Bloom is not fused on older versions, and on newer ones the other two have pages
@pytest.mark.grid
@pytest.mark.parametrize("family", [f for f in UNPAGED if TESTED or f not in ("bloom", "doge", "diffllama")])
def test_continuous_batching_of_a_family_without_pages_is_refused(family):
    fused = fuse({n: specialist(family, **UNPAGED[family]) for n in ("text", "code")})
    before = [s.config._attn_implementation for s in fused.model.specialists.values()]
    with pytest.raises(ValueError, match=f"'text' \\('{family}'\\).*keys and values in pages.*Use `generate`"):
        fused.generate_batch(inputs=[[3, 4, 5]], generation_config=GenerationConfig(max_new_tokens=2))
    assert [s.config._attn_implementation for s in fused.model.specialists.values()] == before
    assert generate(fused, prompt()).shape == (2, 9 + STEPS)


def test_the_family_without_pages_is_named_beside_one_that_has_them():
    fused = fuse(
        {"text": specialist("llama", **UNPAGED["stablelm"]), "code": specialist("stablelm", **UNPAGED["stablelm"])}
    )
    with pytest.raises(ValueError, match="'code' \\('stablelm'\\).*pages"):
        fused.generate_batch(inputs=[[3, 4, 5]], generation_config=GenerationConfig(max_new_tokens=2))


def test_a_prompt_that_continuous_batching_could_not_answer_is_no_answer(monkeypatch):
    fused = fuse({"text": specialist("llama"), "code": specialist("llama", layers=3)})
    forward, steps = fused.forward, []

    def fail_in_the_third_step(*args, **kwargs):
        steps.append(len(steps))
        if len(steps) == 3:
            raise ArithmeticError("out of numbers")
        return forward(*args, **kwargs)

    monkeypatch.setattr(fused, "forward", fail_in_the_third_step)
    config = GenerationConfig(max_new_tokens=STEPS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    with pytest.raises(RuntimeError, match="failed for 2 of 2 prompts: .*out of numbers"):
        fused.generate_batch(inputs=[[3, 4, 5], [6, 7]], generation_config=config, continuous_batching_config=small)


def test_an_answer_that_ends_by_itself_is_whole():
    fused = fuse({"text": specialist("llama"), "code": specialist("llama", layers=3)})
    plain = generate(fused, torch.tensor([[3, 4, 5]]))[0, 3:].tolist()
    config = GenerationConfig(max_new_tokens=STEPS, do_sample=False, eos_token_id=plain[1], pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    answers = fused.generate_batch([[3, 4, 5]], generation_config=config, continuous_batching_config=small)
    assert [a.generated_tokens for a in answers.values()] == [plain[: plain.index(plain[1]) + 1]]
