"""Adapters of one base, and the same specialists merged."""

import os
import subprocess
import sys

from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    set_seed,
)

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import CHAT_TEMPLATE
from tests.support.tiny import specialist, stir_gate, tokenizer


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


ADAPTERS = {
    "text": {"r": 4, "lora_alpha": 8, "target_modules": ALL},
    "code": {"r": 2, "lora_alpha": 3, "target_modules": ATTENTION, "use_rslora": True, "lora_dropout": 0.5},
    "math": {
        "r": 3,
        "target_modules": ALL,
        "rank_pattern": {"down_proj": 6},
        "alpha_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 1},
        "layers_to_transform": [1],
    },
}


BASES = {
    "llama": lambda: specialist("llama", tied=True),
    "qwen2": lambda: specialist("qwen2", layers=3),
    "gemma2": lambda: specialist("gemma2", final_logit_softcapping=1.5, sliding_window=4),
    "granite": lambda: specialist("granite", logits_scaling=0.25, residual_multiplier=0.5),
}


# the token embedding and the head, of ranks of their own; "code" has none on the embedding
ENDS = {"text": ["embed_tokens", "lm_head"], "code": ["lm_head"], "math": ["embed_tokens", "lm_head"]}


def make(folder, family="llama", ends=False):
    """A base and adapters of it, as PEFT saves them; with `ends` on embedding and head, too. Returns name to folder."""
    set_seed(0)
    BASES[family]().save_pretrained(folder / "base")
    if family == "llama":
        tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(folder / "base")
    for name, fields in ADAPTERS.items():
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        # opinions of their own: PEFT's random start changes little
        adapted = get_peft_model(base, _lora(fields, ENDS[name] if ends else [], base))
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                nn.init.normal_(parameter, std=0.3)
        adapted.save_pretrained(folder / name, save_embedding_layers=False)
    return {name: str(folder / name) for name in ADAPTERS}


def _lora(fields, more, base):
    if type(base.get_input_embeddings()) is not nn.Embedding:
        # Gemma scales it
        more = [name for name in more if name != "embed_tokens"]
    fields = fields | {"target_modules": [*fields["target_modules"], *more]}
    if more:
        fields.pop("layers_to_transform", None)
        fields |= {"rank_pattern": fields.get("rank_pattern", {}) | {"embed_tokens": 3, "lm_head": 5}}
    return LoraConfig(**fields, init_lora_weights=False)


def pair(sources, **options):
    """Adapters on one base, and the same specialists merged and fused as models of their own, with one gate."""
    choices = {"gate_hidden_size": 16, "gate_temperature": 3.0, **options}
    adapted = UltraFuserForCausalLM.from_specialists(sources, **choices)
    stir_gate(adapted)
    alone = {name: adapted.specialist(name) for name in sources}
    merged = UltraFuserForCausalLM.from_specialists(alone, **choices)
    merged.model.fusion_gate.load_state_dict(adapted.model.fusion_gate.state_dict())
    for model in (adapted, merged):
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return adapted, merged


CLEAN = """
import sys
for name in ("modeling_ultrafuser", "trainers", "ultrafuser", "tests", "peft"):
    sys.modules[name] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert not any(info.values()), info
expected = load_file(sys.argv[1] + "/expected.safetensors")
with torch.no_grad():
    assert torch.equal(model(expected["ids"]).logits, expected["logits"])
assert torch.equal(model.generate(expected["ids"], max_new_tokens=8, do_sample=False), expected["text"])
"""


def check_where_nothing_is_installed(fused, ids, folder):
    """Saves the model, and compares it with itself in a process that can import neither our packages nor PEFT."""
    fused.save_pretrained(folder / "fused")
    text = fused.generate(ids, max_new_tokens=8, do_sample=False)
    save_file({"ids": ids, "logits": fused(ids).logits, "text": text}, folder / "fused" / "expected.safetensors")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HOME": str(folder / "hf")}
    command = [sys.executable, "-c", CLEAN, str(folder / "fused")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
