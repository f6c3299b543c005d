"""Makes the fused model that `benchmarks.dropping` measures: a base and two merged adapters, three models of their own."""

from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer, set_seed

from modeling_ultrafuser import UltraFuserForCausalLM
from trainers import CachedGateTrainer, GateStageConfig
from ultrafuser.build.fusion_recipe import FusionRecipe, FusionSettings
from ultrafuser.pretrained import load_model, open_fused
from ultrafuser.quickstart.real_data import GATE_ROWS, by_domain
from ultrafuser.quickstart.training import QUIET, train


KEEP, STEPS, EXAMPLES = "top", 300, 4
NEVER = 1_000_000  # steps over which `gate_domain` falls


def fused_model(work: Path, base: str, adapters: dict[str, Path], gate: str, gate_domain: float = 0.0):
    """Returns the fused model and its tokenizer from a folder, where they are made unless they are there.

    Args:
        work: Folder to write, or to go on with.
        base: Folder of the base, which is the specialist "text".
        adapters: Folders of LoRA adapters of it, by name.
        gate: As in `ultrafuser fuse --gate`.
        gate_domain: As in stage one, but it does not fall.
    """
    out = work / (gate.replace(":", "_") + f"_{gate_domain}" * bool(gate_domain))
    if not out.exists():
        merged = {name: _merged(work / name, base, folder) for name, folder in adapters.items()}
        recipe = FusionRecipe(FusionSettings({"text": base, **merged}, gate=gate), dtype="float32")
        set_seed(0)
        recipe.build(out, train=lambda model, tokenizer: _fit_gate(work, model, tokenizer, gate_domain))
    return open_fused(out)


def _merged(place: Path, base: str, adapter: Path) -> str:
    """Writes the base with an adapter merged into it, as a model of its own."""
    if not place.exists():
        model = PeftModel.from_pretrained(load_model(base, dtype=torch.float32), str(adapter)).merge_and_unload()
        partial = place.with_suffix(".partial")
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(base).save_pretrained(partial)
        partial.rename(place)
    return str(place)


def _fit_gate(work: Path, model: UltraFuserForCausalLM, tokenizer, gate_domain: float) -> None:
    """Runs the specialists once over the quickstart's conversations, and trains the gate on what they predicted."""
    data = {domain: Dataset.from_list(rows) for domain, rows in by_domain(GATE_ROWS).items()}
    arguments = GateStageConfig(
        str(work / "stage_one"),
        max_steps=STEPS,
        per_device_train_batch_size=2 * len(data),
        examples_per_domain=EXAMPLES,
        max_length=512,
        bf16=False,
        gradient_checkpointing=False,
        # rows of two domains are among the conversations
        mixed_share=0.0,
        gate_domain=gate_domain,
        gate_domain_steps=NEVER,
        **QUIET,
    )
    train(
        CachedGateTrainer(model, arguments, data, processing_class=tokenizer, cache=work / "cache", keep=KEEP), "gate"
    )
