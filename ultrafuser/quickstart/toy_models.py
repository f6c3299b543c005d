"""Small models from scratch: a tokenizer, a base, and specialists that go on from it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from .training import QUIET, train


LENGTH = 256  # tokens per training example
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@dataclass
class Schedule:
    """Steps and learning rates of training. The rates are measured to fit specialists of a million parameters."""

    base_steps: int = 100
    specialist_steps: int = 80
    specialist_rate: float = 3e-3
    gate_steps: int = 800
    gate_rate: float = 3e-3
    joint_steps: int = 40
    joint_rate: float = 3e-4


def train_tokenizer(texts: list[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer for all specialists alike."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|pad|>", "<|end|>"]
    trainer = BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def to_blocks(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Documents end to end, cut into examples of one length. Shape (examples, LENGTH)."""
    ids = [i for text in texts for i in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def make_specialist(
    blocks: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    schedule: Schedule,
    seed: int,
    base: Path | None = None,
) -> None:
    """Trains a small Llama, from its base or from scratch, on one domain and saves it with its tokenizer."""
    model = new_model(tokenizer, seed) if base is None else LlamaForCausalLM.from_pretrained(base)
    pretrain(model, blocks, folder, schedule.specialist_steps, schedule.specialist_rate, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def new_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """A small Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(seed)
    return LlamaForCausalLM(config)


def pretrain(model: PreTrainedModel, blocks: Tensor, folder: Path, steps: int, rate: float, seed: int) -> None:
    """Trains a model on blocks of text, 8 at each step. Writes nothing; the folder's name is the bar's title."""
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        weight_decay=0.1,
        **QUIET,
        seed=seed,
    )
    dataset = Dataset.from_dict({"input_ids": blocks.tolist(), "labels": blocks.tolist()})
    train(Trainer(model, arguments, train_dataset=dataset), folder.name)
