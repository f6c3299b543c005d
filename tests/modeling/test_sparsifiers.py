"""From scores to weights: temperature, sparsifier, normaliser; and when a gate is asked."""

import json

import pytest
import torch

from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM
from modeling_ultrafuser.fusions_ultrafuser import FUSIONS
from modeling_ultrafuser.gate_base_ultrafuser import Gate, Reads
from modeling_ultrafuser.gates_ultrafuser import GATES
from modeling_ultrafuser.sparsifier_base_ultrafuser import Sparsifier
from modeling_ultrafuser.sparsifiers_ultrafuser import SPARSIFIERS, sparsifier
from tests.support.mixes import fuse, prompt


class TopK(Sparsifier):
    """The k largest weights."""

    def __init__(self, setting):
        self.number = int(setting)

    def kept(self, weights):
        return weights >= weights.topk(self.number, -1).values[..., -1:]


class Nobody(Sparsifier):
    """Leaves all out."""

    def kept(self, weights):
        return torch.zeros_like(weights, dtype=torch.bool)


@pytest.fixture
def more(monkeypatch):
    monkeypatch.setitem(SPARSIFIERS, "top_k", TopK)
    monkeypatch.setitem(SPARSIFIERS, "nobody", Nobody)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_sparsifier_comes_after_the_temperature_and_what_it_leaves_sums_to_one(fusion, more, specialists):
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
def test_a_sparsifier_is_saved_and_none_is_not_written(more, specialists, tmp_path):
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
