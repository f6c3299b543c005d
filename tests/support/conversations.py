"""A small conversation, and stock SFT over it."""

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from tests.support.tiny import tokenizer


CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


# what the paper's stage one does without, for tests of anything else
PAPER = {"weight_decay": 0.0, "gate_dropout": 0.0, "mixed_share": 0.0}


def conversations(number=16):
    """Sums, asked and answered: no two of one length are alike."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"{i}+{i}?"},
                {"role": "assistant", "content": f"It is {2 * i}. " * (1 + i % 3)},
            ]
        }
        for i in range(number)
    ]


def sft_trainer(model, folder, *, data=None, peft_config=None, **settings):
    """TRL's own trainer with settings that suit a test."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        **settings,
    }
    return SFTTrainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_list(conversations() if data is None else data),
        processing_class=tokenizer(chat_template=CHAT_TEMPLATE),
        peft_config=peft_config,
    )


def sft(model, folder, **settings):
    """Trains `model` in place. Returns the losses it printed, one per step."""
    trainer = sft_trainer(model, folder, **settings)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model):
    """A copy of every tensor, to compare with later."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(model, before):
    """Names of the tensors that are not bit by bit what they were."""
    return {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
