"""Gradients are those of the naive sum, whoever is frozen."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from tests.support.fusions import MIXTURES
from tests.support.mixes import MIXES, fuse, naive_gate_weights, naive_logits, prompt


@pytest.fixture
def specialists():
    return MIXES["one family"]()


@pytest.fixture
def fused(specialists):
    return fuse(specialists)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


# ---------------------------------------------------------------------------------------------- gradients


def frozen(fused):
    fused.model.specialists.requires_grad_(False)
    fused.lm_head.requires_grad_(False)
    return fused


def test_frozen_specialists_run_without_autograd_while_the_gate_learns(fused):
    seen, ids = [], prompt()
    for backbone in frozen(fused).model.specialists.values():
        backbone.register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state))
    fused(ids, labels=ids).loss.backward()
    assert len(seen) == 3
    assert all(hidden.grad_fn is None for hidden in seen)
    assert all(p.grad.abs().sum() > 0 for n, p in fused.model.fusion_gate.named_parameters())


def test_a_specialist_that_is_not_frozen_learns_while_another_is(fused):
    ids = prompt()
    frozen(fused).model.specialists["code"].requires_grad_(True)
    fused(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in fused.model.specialists["code"].parameters())
    assert all(p.grad is None for p in fused.model.specialists["text"].parameters())


def test_freezing_does_not_change_the_gates_gradients(fused):
    ids = prompt()
    gradients = []
    for _ in range(2):
        fused.zero_grad()
        fused(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in fused.model.fusion_gate.named_parameters()})
        frozen(fused)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("fusion", MIXTURES)
def test_gradients_are_those_of_the_naive_sum(fusion, specialists):
    fused, ids = fuse(specialists, fusion=fusion), prompt()
    fused(ids, labels=ids).loss.backward()
    learned = {n: p.grad.clone() for n, p in fused.named_parameters()}
    fused.zero_grad()
    logits = naive_logits(fused, specialists, ids, naive_gate_weights(fused, specialists, ids))
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert_same(
        {n: p.grad for n, p in fused.model.fusion_gate.named_parameters()}, part(learned, "model.fusion_gate.")
    )
    widths = [m.config.hidden_size for m in specialists.values()]
    for (name, model), columns in zip(
        specialists.items(), learned["lm_head.weight"].split(widths, dim=-1), strict=True
    ):
        expected = {n: p.grad for n, p in model.base_model.named_parameters()}
        actual = part(learned, f"model.specialists.{name}.")
        if model.config.tie_word_embeddings:
            # its embedding is also its head, which the fused model holds apart
            actual["embed_tokens.weight"] = actual["embed_tokens.weight"] + columns
        else:
            assert_same(columns, model.lm_head.weight.grad)
        assert_same(actual, expected)


def part(tensors, prefix):
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


@pytest.mark.parametrize("mix", ["one family", "windows"])
def test_gradient_checkpointing_gives_the_same_gradients(mix):
    fused, ids = fuse(MIXES[mix]()).train(), prompt()
    gradients = []
    for _ in range(2):
        fused.zero_grad()
        fused(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in fused.named_parameters()})
        fused.gradient_checkpointing_enable()
    assert_same(*gradients)
