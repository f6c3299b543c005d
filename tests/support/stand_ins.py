"""Stand-ins of published models: their shapes, vocabularies, files and cards, with holes where the weights are.

    python -m tests.support.stand_ins FOLDER

writes three of Qwen2.5 and three of Llama 2, for `ultrafuser check` to say what the real ones would take.
"""

import json
import sys
from pathlib import Path

import torch
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

from tests.support.tiny import tokenizer


def rope(base):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base}}


# ---------------------------------------------------------------------------------- shapes, as their makers write them

QWEN_7B = {
    **{"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944},
    **{"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768},
    **rope(1e6),
}
QWEN_1_5B = QWEN_7B | {
    **{"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12},
    **{"num_key_value_heads": 2, "tie_word_embeddings": True},
}
# their mathematicians read less at once
OF_MATH = {"max_position_embeddings": 4096, **rope(1e4)}
LLAMA_2_13B = {
    **{"model_type": "llama", "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824},
    **{"num_hidden_layers": 40, "num_attention_heads": 40, "max_position_embeddings": 4096, **rope(1e4)},
}
LLAMA_3_8B = {
    **{"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336},
    **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192},
    **rope(5e5),
}
# what can be run: the vocabulary is true, the rest is small
SMALL = {
    **{"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4},
}

# as Qwen 2.5 publishes it: TRL keeps a copy
CHATML = Path(trl.__file__).with_name("chat_templates").joinpath("qwen2_5.jinja").read_text()
STEP_BY_STEP = CHATML.replace(
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "Please reason step by step."
)
# Llama 2's, and that of the Alpaca family
INST = "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n\n### Response:"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)


# ---------------------------------------------------------------------------------- folders


def qwen_words(size=151643):
    """Bytes, fillers and 22 tokens that control, as Qwen 2.5 has them."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"token-{i}" for i in range(size))][:size]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|{k}|>" for k in range(19))])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|im_end|>")


def qwen_trio(folder, size=QWEN_7B, words=None, **fields):
    """Three folders: for text, code and mathematics."""
    words = words or qwen_words()
    for name, own in {"text": {}, "code": {}, "math": OF_MATH}.items():
        template = STEP_BY_STEP if name == "math" else CHATML
        stand_in(folder / name, words, template=template, **{**size, **own, **fields, "eos": words.eos_token_id})
    return [folder / name for name in ("text", "code", "math")]


def llama_2_trio(folder, **fields):
    """Three folders whose vocabularies and templates differ: Llama 2 chat, Code Llama and WizardMath."""
    code_llama = {"max_position_embeddings": 16384, **rope(1e6)}
    each = {
        "text": ([], INST, {}),
        "code": ([f"<infill {k}>" for k in range(16)], INST, code_llama),
        "math": (["[PAD]"], ALPACA, {}),
    }
    for name, (added, template, own) in each.items():
        own = {**LLAMA_2_13B, **own, **fields, "vocab_size": 32000 + len(added)}
        stand_in(folder / name, many_words(32000, added), template=template, licence="llama2", **own)
    return [folder / name for name in each]


def stand_in(folder, words, *, shards=1, template=None, licence="apache-2.0", eos=2, weights=False, **fields):
    """A model's folder as its makers publish it, with holes where the weights are, or random ones to run it."""
    config = AutoConfig.for_model(**{"tie_word_embeddings": False, "eos_token_id": eos, **fields})
    config.dtype = torch.float32 if weights else torch.bfloat16
    sees = config.get_text_config() is not config
    with torch.device("cpu" if weights else "meta"):
        model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_config(config)
    if weights:
        model.save_pretrained(folder)
    else:
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        write_weights(folder, {name: list(p.shape) for name, p in model.named_parameters()}, shards)
    words.chat_template = template
    words.save_pretrained(folder)
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    return folder


def write_weights(folder, tensors, shards):
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{k:05}-of-{shards:05}.safetensors" for k in range(1, shards + 1)]
    places = {name: files[k % shards] for k, name in enumerate(tensors)}
    for file in files:
        write_holes(folder / file, {name: tensors[name] for name, place in places.items() if place == file})
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write_holes(path, tensors):
    """A safetensors file with a true header and, on disk, nothing behind it."""
    header, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    written = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        file.truncate(8 + len(written) + end)


def many_words(size, added=(), other=()):
    """A tokenizer of as many tokens as a real one, with more behind them; `other` are in place of the first ones."""
    tokens = [*other, *tokenizer().convert_ids_to_tokens(range(99)), *(f"token-{i}" for i in range(size))][:size]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


if __name__ == "__main__":
    root = Path(sys.argv[1])
    qwen_trio(root / "qwen2.5-1.5b", QWEN_1_5B)
    qwen_trio(root / "qwen2.5-7b")
    llama_2_trio(root / "llama-2-13b")
