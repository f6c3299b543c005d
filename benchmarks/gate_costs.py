"""Measures each gate, beside the paper's: `python -m benchmarks.gate_costs`.

The same three random Llamas of 36 million parameters each under every gate, in float32 with one thread: processor time of a
token, read alone with a context in the cache, and of a prompt. Gates take turns within each round, and every number is the
ratio to the paper's gate in the same round: the median over rounds, with the smallest and the largest. A gate's state is
what the cache holds for a row beyond keys and values. Writes `results/gate_costs.json`.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, set_seed

from benchmarks.timing import compare_ways
from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM
from modeling_ultrafuser.evidence_ultrafuser import EvidenceLayer
from modeling_ultrafuser.gates_ultrafuser import DEFAULT_GATE, gate_settings
from ultrafuser.provenance import provenance
from ultrafuser.quickstart.corpora import DOMAINS


RESULTS = Path(__file__).parent.parent / "results" / "gate_costs.json"
SIZES = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "vocab_size": 16384}
PAPER = "mlp:512"
GATES = (PAPER, DEFAULT_GATE, "linear+calibration", "evidence:128+calibration", "posterior", "uniform")
CONTEXT, STEPS = 64, 12


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    rows = measure_gates(options.rounds, **SIZES)
    for gate, row in rows.items():
        print(gate, json.dumps(row))
    shape = {"specialists": len(DOMAINS), **SIZES, "context": CONTEXT, "rounds": options.rounds}
    options.out.write_text(json.dumps({**provenance(), "shape": shape, "rows": rows}, indent=2) + "\n")


def measure_gates(rounds: int, **sizes: int) -> dict[str, dict]:
    """Parameters, bytes of state and times of each gate."""
    set_seed(0)
    specialist = LlamaConfig(**sizes, num_attention_heads=8, initializer_range=0.05)
    models = {gate: fused(specialist, gate) for gate in GATES}
    first, *others = models.values()
    for model in others:
        # the same weights for all, and room for one of them alone
        model.model.specialists, model.lm_head = first.model.specialists, first.lm_head
    ids = torch.randint(3, sizes["vocab_size"], (1, CONTEXT + STEPS))
    ways = {gate: lambda model=model: seconds(model, ids) for gate, model in models.items()}
    for run in ways.values():
        run()
    times = compare_ways(ways, rounds)
    return {
        gate: {
            "parameters": sum(p.numel() for p in model.model.fusion_gate.parameters()),
            "state_bytes": state_bytes(model, ids),
            **times[gate],
        }
        for gate, model in models.items()
    }


def fused(specialist: LlamaConfig, gate: str) -> UltraFuserForCausalLM:
    """A fused model of random specialists."""
    names = list(DOMAINS)
    config = UltraFuserConfig(specialist_names=names, specialists=[specialist] * len(names), **gate_settings(gate))
    return UltraFuserForCausalLM(config).eval()


def seconds(model: UltraFuserForCausalLM, ids: Tensor) -> dict[str, float]:
    """Processor seconds of a prompt, and of a token behind it."""
    began = time.process_time()
    cache = model(ids[:, :CONTEXT], use_cache=True, logits_to_keep=1).past_key_values
    read = time.process_time()
    for i in range(CONTEXT, CONTEXT + STEPS):
        model(ids[:, i : i + 1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return {"token": (time.process_time() - read) / STEPS, "prompt": read - began}


def state_bytes(model: UltraFuserForCausalLM, ids: Tensor) -> int:
    """Bytes of a gate's state in the cache of one row, once it has read a context: those that tokens are cropped by, too."""
    layers = model(ids[:, :CONTEXT], use_cache=True).past_key_values.layers
    states = [layer.past for layer in layers if isinstance(layer, EvidenceLayer)]
    return sum(tensor.numel() * tensor.element_size() for state in states for tensor in state)


def table(rows: dict[str, dict]) -> str:
    """Markdown of all gates."""
    lines = ["| gate | parameters | a token | a prompt | state per row |", "|---|---:|---:|---:|---:|"]
    for gate, row in rows.items():
        times = ("{median:.2f} ({least:.2f} to {most:.2f})".format(**row[part]) for part in ("token", "prompt"))
        state = f"{row['state_bytes'] / 1024:.0f} KiB" if row["state_bytes"] else "none"
        lines.append(f"| `{gate}` | {row['parameters']:,} | {' | '.join(times)} | {state} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
