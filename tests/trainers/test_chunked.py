"""Scores in chunks against the formula written out, in float64."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainers.heads import HEADS, Head, head_of


TOKENS, VOCAB, WIDTHS = 13, 37, (6, 4, 5)
RULES = list(HEADS)


def config_of(fusion, caps=(None, None, None)):
    specialists = [
        SimpleNamespace(hidden_size=d, final_logit_softcapping=c) for d, c in zip(WIDTHS, caps, strict=True)
    ]
    # logits are bounded once they are mixed, so there the specialists' caps are one
    return SimpleNamespace(
        fusion=fusion,
        specialists=specialists,
        final_logit_softcapping=caps[0],
        adapters=None,
        gate_calibration=False,
        signed_weights=None,
    )


def inputs(tokens=TOKENS, dtype=torch.float64):
    hidden = (2 * torch.randn(tokens, sum(WIDTHS), dtype=dtype)).requires_grad_()
    weights = torch.randn(tokens, len(WIDTHS), dtype=dtype).softmax(-1).requires_grad_()
    head = torch.randn(VOCAB, sum(WIDTHS), dtype=dtype).requires_grad_()
    return hidden, weights, head, torch.randint(0, VOCAB, (tokens,))


def naive(config, hidden, weights, head):
    """Log-probabilities of all words."""
    own = [h @ w.T for h, w in zip(hidden.split(WIDTHS, -1), head.split(WIDTHS, -1), strict=True)]
    bound = [
        (lambda x, c=c.final_logit_softcapping: x if c is None else c * (x / c).tanh()) for c in config.specialists
    ]
    own = torch.stack(own, -1)
    if config.fusion == "logits":
        return bound[0]((weights[:, None] * own).sum(-1)).log_softmax(-1)
    own = torch.stack([f(z) for f, z in zip(bound, own.unbind(-1), strict=True)], -1)
    return (weights[:, None] * own.softmax(-2)).sum(-1).log()


def states_of(config, hidden, weights):
    """What the backbone returns."""
    if config.fusion == "probabilities":
        return hidden
    return torch.cat([h * weights[:, k, None] for k, h in enumerate(hidden.split(WIDTHS, -1))], -1)


@pytest.mark.parametrize("even", [True, False], ids=["a mean", "tokens that count differently"])
@pytest.mark.parametrize("caps", [(None, None, None), (3.0, 3.0, 3.0)], ids=["", "capped"])
@pytest.mark.parametrize("chunk", [1, 5, 13, 100])
@pytest.mark.parametrize("fusion", RULES)
def test_scores_and_all_gradients_are_those_of_the_formula(fusion, chunk, caps, even):
    config, (hidden, weights, head, targets) = config_of(fusion, caps), inputs()
    counts = torch.full((TOKENS,), 0.3, dtype=torch.float64) if even else torch.rand(TOKENS, dtype=torch.float64)
    words = naive(config, hidden, weights, head)
    expected = words.gather(-1, targets[:, None])[:, 0]
    found, entropy, is_top1 = head_of(config).score(
        states_of(config, hidden, weights), weights, head, targets, chunk=chunk
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(entropy, torch.special.entr(words.exp()).sum(-1).detach())
    assert is_top1.equal(words.argmax(-1) == targets)
    gradients = [torch.autograd.grad((f * counts).sum(), [hidden, weights, head]) for f in (expected, found)]
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("caps", [(None, None, None), (3.0, 3.0, 3.0)], ids=["", "capped"])
@pytest.mark.parametrize("chunk", [1, 5, 13, 100])
@pytest.mark.parametrize("fusion", RULES)
def test_a_gate_alone_has_the_gradients_of_the_formula(fusion, chunk, caps):
    config, (hidden, weights, head, targets) = config_of(fusion, caps), inputs()
    hidden.requires_grad_(False)
    head.requires_grad_(False)
    words = naive(config, hidden, weights, head)
    expected = words.gather(-1, targets[:, None])[:, 0]
    states = states_of(config, hidden, weights)
    found, entropy, is_top1 = head_of(config).score(states, weights, head, targets, gate_only=True, chunk=chunk)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(entropy, torch.special.entr(words.exp()).sum(-1).detach())
    assert is_top1.equal(words.argmax(-1) == targets)
    counts = torch.rand(TOKENS, dtype=torch.float64)
    gradients = [torch.autograd.grad((f * counts).sum(), weights)[0] for f in (expected, found)]
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("caps", [(None, None, None), (3.0, 3.0, 3.0)], ids=["", "capped"])
@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize("fusion", RULES)
def test_a_rule_without_a_loss_of_its_own_has_that_of_its_logits(fusion, chunk, caps):
    config, (hidden, weights, head, targets) = config_of(fusion, caps), inputs()
    words = naive(config, hidden, weights, head)
    found, entropy, is_top1 = Head(config).score(
        states_of(config, hidden, weights), weights, head, targets, chunk=chunk
    )
    expected, near = words.gather(-1, targets[:, None])[:, 0], {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(found, expected, **near)
    torch.testing.assert_close(entropy, torch.special.entr(words.exp()).sum(-1).detach(), **near)
    assert is_top1.equal(words.argmax(-1) == targets)
    (of_states, of_weights, of_head), other = (
        torch.autograd.grad(f.sum(), [hidden, weights, head]) for f in (expected, found)
    )
    torch.testing.assert_close(other[::2], (of_states, of_head), **near)
    # weights come out of a softmax, to which it does not matter what is added to all alike
    even = [g - (weights * g).sum(-1, keepdim=True) for g in (of_weights, other[1])]
    torch.testing.assert_close(even[1], even[0], **near)
    assert [len(f) for f in Head(config).score(hidden[:0], weights[:0], head, targets[:0])] == [0, 0, 0]


@pytest.mark.parametrize("gate_only", [True, False])
@pytest.mark.parametrize("fusion", RULES)
def test_no_tokens_give_gradients_of_zero(fusion, gate_only):
    config, (hidden, weights, head, targets) = config_of(fusion), inputs(tokens=0)
    states = states_of(config, hidden, weights)
    found, _, _ = head_of(config).score(states, weights, head, targets, gate_only=gate_only)
    found.sum().backward()
    assert weights.grad.shape == (0, 3)
    assert gate_only or not head.grad.any()


def test_a_graph_that_is_kept_can_be_walked_twice():
    config, (hidden, weights, head, targets) = config_of("probabilities"), inputs()
    loss = -head_of(config).score(hidden, weights, head, targets)[0].mean()
    first, second = (torch.autograd.grad(loss, [hidden, weights, head], retain_graph=True) for _ in range(2))
    torch.testing.assert_close(second, first)


def test_a_weight_of_zero_and_a_word_that_underflows_leave_everything_finite():
    config, (hidden, _, head, targets) = config_of("probabilities"), inputs(dtype=torch.float32)
    weights = torch.tensor([[1.0, 0.0, 0.0]]).expand(TOKENS, -1).clone().requires_grad_()
    found = head_of(config).score(100 * hidden, weights, head, targets)[0]
    assert found.min() < -200
    assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), [hidden, weights, head]))


@pytest.mark.parametrize("gate_only", [True, False])
@pytest.mark.parametrize("fusion", RULES)
def test_sixteen_bits_are_near_float32(fusion, gate_only):
    config, (hidden, weights, head, targets) = config_of(fusion), inputs(dtype=torch.float32)

    def scored(hidden, head, autocast):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            states = states_of(config, hidden, weights.to(hidden.dtype))
            found = head_of(config).score(states, weights, head, targets, gate_only=gate_only, chunk=5)[0]
        wanted = [weights] if gate_only else [hidden, head]
        return found, *torch.autograd.grad(found.mean(), wanted, allow_unused=True)

    exact = scored(hidden, head, False)
    half = [t.detach().bfloat16().requires_grad_() for t in (hidden, head)]
    for found in (scored(hidden, head, True), scored(*half, False)):
        assert found[0].dtype == torch.float32
        for one, other in zip(found, exact, strict=True):
            assert (one.float() - other).norm() < 0.03 * other.norm()


def test_no_tensor_of_tokens_times_vocabulary_is_made():
    tokens, vocab, largest = 64, 512, 0
    config = config_of("probabilities")
    hidden, weights = torch.randn(tokens, sum(WIDTHS)).requires_grad_(), torch.rand(tokens, 3).softmax(-1)
    head, targets = torch.randn(vocab, sum(WIDTHS)).requires_grad_(), torch.randint(0, vocab, (tokens,))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            for tensor in found if isinstance(found, tuple | list) else [found]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return found

    with Watch():
        (-head_of(config).score(hidden, weights, head, targets, chunk=4)[0].mean()).backward()
    assert largest == head.numel() < tokens * vocab
