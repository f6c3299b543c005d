"""Trains a stage in a process of its own, or several, and writes down what came out: `python -m tests.stage_run JSON`.

JSON holds: `stage` ("gate" or "joint"), `folder`, `settings` for its configuration, `sizes` of the domains, `fuse` for
`from_specialists`, `kill_at` (a step in whose middle the process kills itself, as hard as it can), `resume`, `fsdp`,
`lora`. Under `torchrun` every process runs it. The first one writes `outcome.pt` into the folder: losses by step, the
mixes, draws and final weights.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback, set_seed

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.tiny import specialist, tokenizer
from tests.training import CHAT_TEMPLATE, conversations
from trainers import GateTrainer, JointTrainer


QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False, "logging_steps": 1}
SMALL = {"max_steps": 6, "examples_per_domain": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}


class Kill(TrainerCallback):
    """Ends the process in the middle of a step, with no chance to tidy up."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def data(sizes, seed=0):
    """Sums in every domain, of different lengths, so that a wrong share of tokens shows."""
    rows = {name: conversations(10 * len(sizes) + size)[10 * i :][:size] for i, (name, size) in enumerate(sizes.items())}
    return {name: Dataset.from_list(part) for name, part in rows.items()}


def build(job):
    """The trainer of a job."""
    set_seed(0)
    specialists = {"text": specialist(), "code": specialist(layers=1), "math": specialist(layers=3)}
    model = UltraFuserForCausalLM.from_specialists(specialists, **job.get("fuse", {}))
    cls = {"gate": GateTrainer, "joint": JointTrainer}[job["stage"]]
    arguments = cls.config_class(job["folder"], **{**QUIET, "save_strategy": "no", **SMALL, **job.get("settings", {})})
    extra = {}
    if job.get("lora"):
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    sizes = job.get("sizes", {"text": 9, "code": 7, "math": 12})
    return cls(model, arguments, data(sizes), processing_class=tokenizer(chat_template=CHAT_TEMPLATE), **extra)


def outcome(trainer):
    """What two runs must share. Losses and everything logged by step, mixes, and weights."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    mixes = [] if trainer.controller is None else trainer.controller.mixes
    state = trainer.accelerator.get_state_dict(trainer.model)
    return {"logs": logs, "mixes": mixes, "drawn": trainer.sampler.mixes, "weights": state}


def main():
    job = json.loads(sys.argv[1])
    trainer = build(job)
    if "kill_at" in job:
        trainer.add_callback(Kill(job["kill_at"]))
    trainer.train(resume_from_checkpoint=job.get("resume"))
    found = outcome(trainer)
    if trainer.is_world_process_zero():
        torch.save(found, Path(job["folder"]) / "outcome.pt")


if __name__ == "__main__":
    main()
