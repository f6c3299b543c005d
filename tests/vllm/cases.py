"""Tiny fused models that vLLM must serve right, and those that it must refuse."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.tiny import specialist, tokenizer


WINDOW = 16
NEW_TOKENS = 32
# (first token, length): several cross the window by far, two share a beginning, which vLLM computes once
SLICES = [(0, 90), (0, 120), (3, 5), (20, 17), (40, 24), (60, 40), (90, 57), (110, 64), (130, 1)]
TEXT = """def area(r):
    return 3.14159 * r ** 2
The river rose in the night, and nobody in the village had thought to move the boats. What is 47 * 36? First 40 * 36 =
1440, then 7 * 36 = 252, so that the answer is 1692. for i in range(10): print(i, i * i) # squares, and nothing else.
When morning came the children counted them: four were gone, three were broken, and one lay in the tree.
"""
CHAT = [{"role": "user", "content": "What is 6 * 7?"}]
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)

# four attention heads of 32, a size that vLLM's attention on a CPU supports
_SHAPE = {"hidden_size": 128}
_DEEPSEEK = {
    **{"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 32, "head_dim": 16},
    **{"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
}

# what it shows: (family and fields of each specialist)
SERVED = {
    "three depths, one tied": [("llama", {}), ("llama", {"layers": 3, "tied": True}), ("llama", {"layers": 4})],
    "Llama and Mistral with a window": [("llama", {}), ("mistral", {"layers": 3, "sliding_window": WINDOW})],
    "windows everywhere": [
        ("mistral", {"sliding_window": WINDOW}),
        ("mistral", {"layers": 3, "sliding_window": WINDOW}),
    ],
    "hidden sizes 128 and 160": [("llama", {}), ("llama", {"layers": 3, "hidden_size": 160, "head_dim": 32})],
    # embeddings that scale, norms of heads, windows in every other layer, a bound on the fused logits
    "Gemma 2 without attention caps": [
        ("gemma2", {"attn_logit_softcapping": None, "sliding_window": WINDOW}),
        ("gemma2", {"attn_logit_softcapping": None, "sliding_window": WINDOW, "layers": 3}),
    ],
    "Qwen 3 and Gemma 3": [("qwen3", {}), ("gemma3_text", {"layers": 3, "sliding_window": WINDOW})],
    "the paper's gate": [("llama", {}), ("llama", {"layers": 3, "hidden_size": 160, "head_dim": 32})],
    "an evidence gate that calibrates": [("llama", {}), ("llama", {"layers": 3, "hidden_size": 160, "head_dim": 32})],
    "an evidence gate and a window": [
        ("llama", {}),
        ("mistral", {"layers": 3, "sliding_window": WINDOW}),
        ("llama", {"layers": 1}),
    ],
    "a posterior gate": [("llama", {}), ("llama", {"layers": 3})],
    "an anchor gate and a sparsifier": [("llama", {}), ("llama", {"layers": 3}), ("llama", {"layers": 1})],
    "signed weights": [("llama", {}), ("llama", {"layers": 3}), ("llama", {"layers": 1})],
}
# how those are fused that are not fused by default
CHOICES = {
    "the paper's gate": {"gate": "mlp"},
    "an evidence gate that calibrates": {"gate": "evidence:128+calibration"},
    "an evidence gate and a window": {"gate": "evidence:128"},
    "a posterior gate": {"gate": "posterior", "gate_switch_probability": 0.02},
    "an anchor gate and a sparsifier": {"gate": "anchor:b", "gate_sparsifier": "top_k:2"},
    "signed weights": {"gate": "linear", "signed_weights": [1.0, 0.7, -0.7]},
}
# which of those read their prompts in several steps of the engine, and a second time from its cache
IN_PARTS = ("hidden sizes 128 and 160", "an evidence gate that calibrates", "an evidence gate and a window")
PARTS = {"max_num_batched_tokens": 32, "max_num_seqs": 4, "enable_prefix_caching": True, "block_size": 32}
# a gate's weight, or scale, must differ by more than that between the tokens of a text
LEAST_SPREAD = 0.1

# what it shows: (family and fields of each specialist, how they are fused, what the refusal says)
REFUSED = {
    "differing windows": (
        [("mistral", {"sliding_window": 16}), ("mistral", {"sliding_window": 32})],
        {},
        "knows one attention window for all specialists, but it is {'a': 16, 'b': 32}",
    ),
    "differing attention heads": (
        [("llama", {}), ("llama", {"num_attention_heads": 8, "head_dim": 16})],
        {},
        "knows one `num_attention_heads` for all specialists, but it is {'a': 4, 'b': 8}",
    ),
    "differing key-value heads": (
        [("llama", {}), ("llama", {"num_key_value_heads": 4})],
        {},
        "knows one `num_key_value_heads` for all specialists, but it is {'a': 2, 'b': 4}",
    ),
    "differing head sizes": (
        [("llama", {}), ("llama", {"head_dim": 64})],
        {},
        "knows one `head_dim` for all specialists, but it is {'a': 32, 'b': 64}",
    ),
    "attention soft caps": (
        [("gemma2", {"attn_logit_softcapping": 50.0}), ("gemma2", {"attn_logit_softcapping": 50.0})],
        {},
        "knows one attention soft cap for all specialists; it must be None in each, but it is {'a': 50.0, 'b': 50.0}",
    ),
    "mixture of experts": (
        [("llama", {}), ("mixtral", {"num_local_experts": 4})],
        {},
        "cannot load mixture-of-experts specialists; the number of experts must be absent, but it is",
    ),
    "latent attention (MLA)": (
        [("deepseek_v3", _DEEPSEEK), ("deepseek_v3", _DEEPSEEK)],
        {},
        "cannot mix latent attention (MLA) with others; `kv_lora_rank` must be absent, but it is {'a': 32, 'b': 32}",
    ),
    "a mixture of probabilities": (
        [("llama", {}), ("llama", {})],
        {"fusion": "probabilities"},
        "computes logits with one linear head, which needs fusion='logits'",
    ),
}


def save_fused(folder: Path, specialists: list[tuple[str, dict]], choices: dict | None = None) -> None:
    """Saves a fused model whose gate has opinions that differ from token to token, with its tokenizer."""
    set_seed(0)
    parts = {name: specialist(f, **{**_SHAPE, **fields}) for name, (f, fields) in zip("abc", specialists)}  # noqa: B905
    model = UltraFuserForCausalLM.from_specialists(parts, **(choices or {}))
    stir_by_width(model)
    model.save_pretrained(folder)
    tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(folder)


def stir_by_width(model: PreTrainedModel) -> None:
    """Draws all of a gate's layers, the last ones too, so that few of its scores are where softmax or clamp end."""
    for parameter in model.model.fusion_gate.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)


def prompts_and_answers(folder: Path, dtype: str) -> dict:
    """What transformers says: prompts as token ids, and its greedy continuation of each, one at a time."""
    torch.set_num_threads(1)  # models this small only lose by more
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()
    words = AutoTokenizer.from_pretrained(folder)
    limit = model.config.max_position_embeddings
    ids = words.encode(TEXT, add_special_tokens=False)
    prompts = [ids[start : start + length] for start, length in SLICES if length + NEW_TOKENS <= limit]
    prompts = [p for p in prompts if p]
    window = getattr(model.config, "sliding_window", None)
    if window and sum(len(p) > window for p in prompts) < 2:
        raise ValueError(
            f"Prompts must exceed the attention window, but it is {window} and the longest is {len(prompts[0])}."
        )
    check_spread(model, prompts[0])
    chat = words.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    answers, log_probs = zip(*(greedy(model, p) for p in [*prompts, chat]), strict=True)
    return {
        "prompts": prompts,
        "answers": list(answers[:-1]),
        "log_probs": list(log_probs[:-1]),
        "window": window,
        "messages": CHAT,
        "chat_answer": answers[-1],
        "chat_text": words.decode(answers[-1], skip_special_tokens=True),
    }


@torch.no_grad()
def check_spread(model: PreTrainedModel, prompt: list[int]) -> None:
    """Refuses a calibrated gate that says the same at every token: nothing would be compared.

    Raises:
        ValueError: With the standard deviations over the tokens.
    """
    if not model.config.gate_calibration:
        return
    output = model(torch.tensor([prompt]))
    spreads = [t[0, :, 0].std().item() for t in (output.gate_weights, output.logit_scales)]
    if min(spreads) < LEAST_SPREAD:
        raise ValueError(
            f"The gate's weights and scales must differ by {LEAST_SPREAD} between tokens, but got {spreads}."
        )


def greedy(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The most likely next tokens, up to and with the end of text, and their log-probabilities.

    A factor on logits changes which token is the likeliest never, and its probability always.
    """
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, **options)
    tokens = output.sequences[0, len(prompt) :]
    log_probs = torch.cat(output.logits).float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    return tokens.tolist(), log_probs.tolist()
