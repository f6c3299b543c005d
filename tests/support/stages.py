"""Small stages of training, and what they log."""

import pytest
from datasets import Dataset

from tests.support.conversations import CHAT_TEMPLATE, PAPER, conversations
from tests.support.stage_run import data as sums
from tests.support.tiny import tokenizer
from trainers import GateTrainer, JointTrainer


SIZES = {"text": 9, "code": 7, "math": 12}
BOTH = pytest.mark.parametrize("stage", [GateTrainer, JointTrainer])


def domains(sizes):
    return {name: Dataset.from_list(conversations(size)) for name, size in sizes.items()}


def trainer(cls, model, folder, data=None, *, more=None, **settings):
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        **PAPER,
        **settings,
    }
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    data = domains({"text": 8, "code": 6, "math": 9}) if data is None else data
    arguments = cls.config_class(str(folder), **{**quiet, "examples_per_domain": 2, **settings})
    return cls(model, arguments, data, processing_class=tokenizer(chat_template=CHAT_TEMPLATE), **(more or {}))


def logs(stage):
    """What a finished stage logged, by step."""
    return [entry for entry in stage.state.log_history if "loss" in entry]


def batch_of(stage, batch=0):
    """What one optimizer step reads, in one piece."""
    draws = list(stage.sampler)[batch * stage.sampler.batch_size :][: stage.sampler.batch_size]
    stage.sampler.batches_drawn = 0
    return stage.data_collator([stage.train_dataset[i] for i in draws])


def build(cls, model, folder, *, data=None, cached=None, more=None, **settings):
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "learning_rate": 3e-2,
        "logging_steps": 1,
        **PAPER,
        **settings,
    }
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    arguments = cls.config_class(str(folder), **{**quiet, "examples_per_domain": 2, **settings})
    words = tokenizer(chat_template=CHAT_TEMPLATE)
    data = sums(SIZES) if data is None else data
    return cls(model, arguments, data, processing_class=words, **(cached or {}), **(more or {}))
