"""Transformers' own tests of its models, against fused models, and quick tests of what they found."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.tiny import GATE_WORDS


@pytest.mark.slow
def test_fused_models_pass_the_common_tests_of_transformers():
    pytest.importorskip("parameterized")
    command = [sys.executable, str(Path(__file__).parents[1] / "common" / "check_common.py")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2_000:]


@pytest.mark.grid
@pytest.mark.parametrize("positions", [0, [0, 3, -1], [-13, 99]])
def test_hidden_states_can_be_asked_for_by_position(positions, fused):
    ids = torch.arange(3, 9)[None]
    every = fused(ids, output_hidden_states=True).hidden_states
    if positions == 0:
        # as in the library, where a bare 0 means no
        assert fused(ids, output_hidden_states=0).hidden_states is None
        return
    some = fused(ids, output_hidden_states=positions).hidden_states
    assert len(some) == len(every) == 13
    kept = {i % 13 for i in positions if -13 <= i < 13}
    assert {i for i, state in enumerate(some) if state is not None} == kept
    assert all(torch.equal(some[i], every[i]) for i in kept)


@pytest.mark.grid
@pytest.mark.parametrize("gate", GATE_WORDS)
def test_a_gate_calls_every_module_whose_parameters_it_reads(gate, specialists):
    # FSDP gathers parameters when their module is called; one that is only read stays cut in pieces
    fused = UltraFuserForCausalLM.from_specialists(specialists, gate=gate)
    called = set()
    for name, module in fused.model.fusion_gate.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    fused(torch.arange(3, 9)[None])
    owners = {name.rpartition(".")[0] for name, _ in fused.model.fusion_gate.named_parameters()}
    assert owners <= called
