"""Trains stages in processes of their own and writes down what came out: `python -m tests.support.stage_run`.

Every line that comes in is a JSON list of jobs, which run one after another, each in forked processes, so that a run
can be killed and the next one resume it, while the libraries are imported once. The answer is a line: null, or which job
did not end as it was to. A job holds: `stage` ("gate" or "joint"), `folder`, and optionally `settings` for its
configuration, `sizes` of the domains, `fuse` for `from_specialists`, `processes`, `kill_at` (a step in whose middle
every process kills itself, as hard as it can), `kill_saving` (the step whose checkpoint it does not finish), `refused`
(what the error says that it is to end with), `resume`, `fsdp` and `lora`. The first process writes `outcome.pt` into the
folder: what was logged by step, mixes, draws and final weights.
"""

import gc
import json
import os
import re
import signal
import socket
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainerCallback, set_seed

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import CHAT_TEMPLATE, PAPER, conversations
from tests.support.tiny import specialist, tokenizer
from trainers import GateTrainer, JointTrainer


QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False, "logging_steps": 1}
SMALL = {"max_steps": 6, "examples_per_domain": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, **PAPER}


class Kill(TrainerCallback):
    """Ends the process in the middle of a step, with no chance to tidy up."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def data(sizes):
    """Sums in every domain, no sum twice, of different lengths, so that a wrong share of tokens shows."""
    starts = [sum(list(sizes.values())[:i]) for i in range(len(sizes))]
    rows = conversations(sum(sizes.values()))
    return {n: Dataset.from_list(rows[start:][:size]) for (n, size), start in zip(sizes.items(), starts, strict=True)}


def build(job):
    """The trainer of a job. It writes down which sums it sees, by step."""
    set_seed(0)
    specialists = {"text": specialist(), "code": specialist(layers=1), "math": specialist(layers=3)}
    model = UltraFuserForCausalLM.from_specialists(specialists, **{"gate": "mlp", **job.get("fuse", {})})
    cls = {"gate": GateTrainer, "joint": JointTrainer}[job["stage"]]
    arguments = cls.config_class(job["folder"], **{**QUIET, "save_strategy": "no", **SMALL, **job.get("settings", {})})
    extra = {}
    if job.get("lora"):
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    words = tokenizer(chat_template=CHAT_TEMPLATE)

    class Recorded(cls):
        draws = ()

        def training_step(self, model, inputs, *args, **kwargs):
            sums = [int(i) for i in re.findall(r"(\d+)\+", "".join(words.batch_decode(inputs["input_ids"])))]
            self.draws = [*self.draws, (self.state.global_step, sums)]
            return super().training_step(model, inputs, *args, **kwargs)

        def _save_rng_state(self, output_dir):
            super()._save_rng_state(output_dir)
            if self.state.global_step == job.get("kill_saving"):
                os.kill(os.getpid(), signal.SIGKILL)

    sizes = job.get("sizes", {"text": 9, "code": 7, "math": 12})
    trainer = Recorded(model, arguments, data(sizes), processing_class=words, **extra)
    if "kill_at" in job:
        trainer.add_callback(Kill(job["kill_at"]))
    return trainer


def outcome(trainer):
    """What two runs must share. Losses and everything logged by step, mixes, draws by step, and weights."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    mixes = [] if trainer.controller is None else trainer.controller.mixes
    baseline = None if trainer.controller is None else trainer.controller.reward.baseline
    draws = {}
    for step, sums in gather_object(list(trainer.draws)):
        draws[step] = draws.get(step, []) + sums
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {
        "logs": logs,
        "mixes": mixes,
        "baseline": baseline,
        "drawn": trainer.sampler.mixes,
        "draws": {step: sorted(sums) for step, sums in draws.items()},
        "weights": {name: tensor.clone() for name, tensor in (state or {}).items()},
    }


def shard_on_cpu():
    """Lets accelerate shard without a GPU: it looks for one before it looks whether sharding was asked for."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = init


def zero_on_cpu():
    """Lets accelerate start DeepSpeed without a GPU: it knows no process group for it there."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def run(job):
    """One process of a job."""
    torch.set_num_threads(1)
    if job.get("settings", {}).get("deepspeed"):
        zero_on_cpu()
    if job.get("fsdp"):
        shard_on_cpu()
    trainer = build(job)
    trainer.train(resume_from_checkpoint=job.get("resume"))
    found = outcome(trainer)
    if trainer.is_world_process_zero():
        torch.save(found, Path(job["folder"]) / "outcome.pt")


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def spawn(job):
    """Runs a job in forked processes. As soon as one ends badly the others are ended too, as `torchrun` does.

    Returns:
        What is wrong if it does not end as it is to, or None.
    """
    processes, port = job.get("processes", 1), free_port()
    children = []
    for rank in range(processes):
        child = os.fork()
        if not child:
            signal.alarm(300)  # processes may wait for each other for ever
            if processes > 1:
                places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in {**places, **address}.items()})
            try:
                run(job)
                os._exit(0)
            except BaseException as error:
                if "refused" in job and job["refused"] in str(error):
                    os._exit(0)
                sys.excepthook(type(error), error, error.__traceback__)
                os._exit(1)
        children.append(child)
    failed = False
    while children:
        child, status = os.wait()
        children.remove(child)
        if status and not failed:
            failed = True
            for other in children:
                os.kill(other, signal.SIGKILL)
    killed = "kill_at" in job or "kill_saving" in job
    return None if failed == killed else f"The job was {'not ' if killed else ''}to end well: {job}"


def main():
    # what others print is no answer
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # the library compiles its patterns where they are used first
    UltraFuserForCausalLM.from_specialists({name: specialist(layers=1) for name in "ab"})
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        failed = next(filter(None, map(spawn, json.loads(line))), None)
        print(json.dumps(failed), file=out, flush=True)


if __name__ == "__main__":
    main()
