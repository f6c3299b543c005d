"""From scores to weights: temperature, sparsifier, normaliser; and when a gate is asked."""

import json

import pytest
import torch

from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM
from modeling_ultrafuser.gate_base_ultrafuser import Gate, Reads
from modeling_ultrafuser.gates_ultrafuser import GATES
from modeling_ultrafuser.sparsifier_base_ultrafuser import Sparsifier
from modeling_ultrafuser.sparsifiers_ultrafuser import SPARSIFIERS, sparsifier
from tests.support.fusions import MIXTURES
from tests.support.mixes import fuse, prompt


class Nobody(Sparsifier):
    """Leaves all out."""

    def kept(self, weights):
        return torch.zeros_like(weights, dtype=torch.bool)


def sparse(word, weights):
    """The weights that a sparsifier leaves of these."""
    return sparsifier(word)(torch.tensor(weights).log()).softmax(-1)


WORDS = ("top_k:2", "top_p:0.7", "top_p:0.75", "ratio:0.45", "threshold:0.25")


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.5, 0.3, 0.2], 5 * [[0.625, 0.375, 0.0]]),
        ([0.4, 0.4, 0.2], [*3 * [[0.5, 0.5, 0.0]], [0.4, 0.4, 0.2], [0.5, 0.5, 0.0]]),
        ([0.98, 0.01, 0.01], [[98 / 99, 1 / 99, 0.0], *4 * [[1.0, 0.0, 0.0]]]),
        ([1 / 3] * 3, [[0.5, 0.5, 0.0], *4 * [[1 / 3] * 3]]),
    ],
)
def test_what_is_left_of_four_vectors(weights, expected):
    for word, left in zip(WORDS, expected, strict=True):
        torch.testing.assert_close(sparse(word, weights), torch.tensor(left), msg=word)


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1], [1.0, 1e-12, 1e-30]])
def test_settings_that_keep_everything_change_nothing(weights):
    for word in ("none", "top_k:3", "top_k:9", "top_p:1.0", "ratio:1e-40", "threshold:0"):
        assert sparsifier(word).chosen(torch.tensor(weights)).all(), word


def test_one_specialist_is_kept_and_of_equals_the_first():
    for word in ("top_k:1", "top_p:1e-9", "ratio:1", "threshold:0.99"):
        assert torch.equal(sparse(word, [0.2, 0.5, 0.3]), torch.tensor([0.0, 1.0, 0.0])), word
    assert torch.equal(sparse("top_k:1", [0.25, 0.5, 0.25]), torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(sparse("top_k:1", [0.4, 0.4, 0.2]), torch.tensor([1.0, 0.0, 0.0]))


def test_of_two_specialists_three_sparsifiers_say_the_same():
    """w2 / w1 >= b, w1 < 1 / (1 + b) and w2 >= b / (1 + b) are one condition."""
    weights = torch.rand(1_000, 1, dtype=torch.double)
    weights = torch.cat([weights, 1 - weights], -1)
    for part in (0.1, 0.5, 0.9):
        words = (f"ratio:{part}", f"top_p:{1 / (1 + part)}", f"threshold:{part / (1 + part)}")
        first, *others = [sparsifier(word).chosen(weights) for word in words]
        assert 0 < first.sum() - len(weights) < len(weights)
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("word", [*WORDS, "none"])
def test_weights_sum_to_one_and_what_is_no_number_stays_none(word):
    left = sparsifier(word)(torch.randn(500, 4)).softmax(-1)
    torch.testing.assert_close(left.sum(-1), torch.ones(500))
    assert sparsifier(word)(torch.tensor([1.0, float("nan"), 0.0])).softmax(-1).isnan().all()


def test_a_gate_that_learns_leaves_nobody_out(specialists):
    fused, ids = fuse(specialists, gate_sparsifier="top_k:1"), prompt()
    assert (fused(ids).gate_weights == 0).sum(-1).eq(2).all()
    fused.train()
    assert (fused(ids, labels=ids).gate_weights > 0).all()


def test_one_folder_is_read_with_any_sparsifier(specialists, tmp_path):
    fuse(specialists).save_pretrained(tmp_path)
    weights = UltraFuserForCausalLM.from_pretrained(tmp_path, gate_sparsifier="top_k:1")(prompt()).gate_weights
    assert (weights == 0).sum(-1).eq(2).all()
    with pytest.raises(ValueError, match="top_k keeps a number"):
        UltraFuserForCausalLM.from_pretrained(tmp_path, gate_sparsifier="top_k:all")


@torch.no_grad()
def test_the_one_that_is_kept_at_every_token_says_what_it_says_alone(specialists):
    model, ids = fuse(specialists, gate="constant", gate_sparsifier="top_k:1"), prompt()
    model.model.fusion_gate.logits.copy_(torch.tensor([0.1, 0.3, 0.2]))
    torch.testing.assert_close(model(ids).logits, model.specialist("code")(ids).logits)


@pytest.mark.parametrize(
    "word",
    [*(f"top_k{s}" for s in ("", ":", ":0", ":-1", ":1.5", ":two")), "top_p:0", "top_p:1.1", "top_p:nan"]
    + [*("top_p", "ratio:0", "ratio:2", "ratio:-inf", "threshold:1", "threshold:-0.1", "threshold:nan", "threshold")],
)
def test_a_setting_out_of_range_is_refused_with_the_rule(word):
    name = word.partition(":")[0]
    with pytest.raises(ValueError, match=f"{name} keeps .* as in {name}:.* But got"):
        UltraFuserConfig(gate_sparsifier=word)


@pytest.fixture
def more(monkeypatch):
    monkeypatch.setitem(SPARSIFIERS, "nobody", Nobody)


@pytest.mark.parametrize("fusion", MIXTURES)
def test_a_sparsifier_comes_after_the_temperature_and_what_it_leaves_sums_to_one(fusion, specialists):
    dense, ids = fuse(specialists, fusion=fusion), prompt()
    sparse = fuse(specialists, fusion=fusion, gate_sparsifier="top_k:2")
    sparse.load_state_dict(dense.state_dict())
    weights, found = dense(ids).gate_weights, sparse(ids).gate_weights
    smallest = weights.argmin(-1, keepdim=True)
    left = weights.scatter(-1, smallest, 0.0)
    torch.testing.assert_close(found, left / left.sum(-1, keepdim=True))
    assert not found.gather(-1, smallest).any()
    assert sparse(ids, labels=ids).loss.isfinite()


def test_the_largest_weight_is_never_left_out(more, specialists):
    weights = fuse(specialists, gate_sparsifier="nobody")(prompt()).gate_weights
    assert torch.equal(weights.sort(-1).values, torch.tensor([0.0, 0.0, 1.0]).expand(2, 9, 3))


@pytest.mark.e2e
def test_a_sparsifier_is_saved_and_none_is_not_written(specialists, tmp_path):
    for word in ("none", "top_k:2"):
        model = fuse(specialists, gate_sparsifier=word)
        model.save_pretrained(tmp_path / word[:4])
        assert json.loads((tmp_path / word[:4] / "config.json").read_text()).get("gate_sparsifier", "none") == word
        loaded, ids = UltraFuserForCausalLM.from_pretrained(tmp_path / word[:4]), prompt()
        assert torch.equal(loaded(ids).gate_weights, model(ids).gate_weights)
    assert "gate_sparsifier" not in (tmp_path / "none" / "config.json").read_text()


@pytest.mark.parametrize(
    ("word", "message"),
    [("top_q", "Unknown sparsifier 'top_q'"), ("none:3", "has no setting, but got '3'"), (2, "Unknown sparsifier 2")],
)
def test_an_unknown_sparsifier_or_setting_is_refused(word, message):
    for make in (sparsifier, lambda word: UltraFuserConfig(gate_sparsifier=word)):
        with pytest.raises(ValueError, match=message):
            make(word)


class Parity(Gate):
    """All weight on the first specialist at even tokens, on the second at odd ones."""

    reads = Reads.PROMPT

    def scores(self, hidden_states):
        odd = hidden_states[0][..., 0] % 2
        return 1e3 * torch.stack([1 - odd, odd, -torch.ones_like(odd)], -1)


@pytest.mark.grid
@pytest.mark.parametrize("gate", ["uniform", "parity", "mlp", "posterior"])
def test_a_gate_that_reads_neither_states_nor_past_is_asked_before_the_specialists_run(gate, specialists, monkeypatch):
    monkeypatch.setitem(GATES, "parity", Parity)
    fused, ids, order = fuse(specialists, gate=gate), prompt(), []
    fused.model.fusion_gate.register_forward_hook(lambda *_: order.append("gate"))
    fused.model.specialists["text"].register_forward_hook(lambda *_: order.append("text"))
    weights = fused(ids).gate_weights
    assert order == (["gate", "text"] if gate in ("uniform", "parity") else ["text", "gate"])
    if gate == "parity":
        assert torch.equal(weights.argmax(-1), ids % 2)
