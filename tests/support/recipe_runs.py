"""What a new strategy must do, run in a process that imports our packages from a copy to which it was added.

The process has imported other libraries already, and none of ours: see `test_recipes.py`.
"""

import math
import os
import sys
import traceback


OURS = ("modeling_ultrafuser", "trainers", "ultrafuser", "benchmarks")


def run(kind, arguments, copy, log):
    """Runs one function of this module in the folder of `log`, and ends the process with status 0 if it returns."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        os.chdir(log.parent)
        assert not set(OURS) & set(sys.modules)
        # another test's folder of remote code would hide this one's
        sys.path[:] = [
            str(copy),
            *(p for p in sys.path if not os.path.exists(os.path.join(p, "transformers_modules"))),
        ]
        try:
            globals()[kind](*arguments)
        except BaseException:
            traceback.print_exc()
            sys.stdout.flush()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)


def command(*words):
    """Runs a command and returns what it prints."""
    from typer.testing import CliRunner

    from ultrafuser.cli.app import app

    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})
    if result.exit_code != 0:
        raise AssertionError(f"ultrafuser {' '.join(words)}: {result.output}") from result.exception
    return result.output


def specialists(names):
    from tests.support.tiny import specialist, tokenizer

    for k, name in enumerate(names):
        specialist(layers=1 + k % 2, hidden_size=16 * (1 + k % 2)).save_pretrained(name)
        tokenizer().save_pretrained(name)


def ids():
    import torch

    return torch.arange(3, 40)[None]


def strategy(option, word):
    """A gate, a fusion rule or a sparsifier: fused, run, saved, loaded, edited, checked, trained and listed."""
    import torch
    from safetensors.torch import save_file

    specialists("abc")
    assert word.partition(":")[0] in command("fuse", "--help")
    command("check", "a", "b", f"--{option}", word)
    command("fuse", "a=a", "b=b", "--out", "fused", f"--{option}", word)

    from modeling_ultrafuser import UltraFuserForCausalLM

    model = UltraFuserForCausalLM.from_pretrained("fused")
    torch.manual_seed(0)
    for parameter in model.model.fusion_gate.parameters():
        torch.nn.init.normal_(parameter)
    expected = model(ids())
    assert expected.logits.isfinite().all()
    assert torch.allclose(expected.gate_weights.sum(-1), torch.ones(1))
    model.save_pretrained("saved")
    save_file({"logits": expected.logits, "gate_weights": expected.gate_weights}, "expected.safetensors")
    assert torch.equal(UltraFuserForCausalLM.from_pretrained("saved")(ids()).logits, expected.logits)
    edits(word)
    stage(model, mix_reward=None)


def edits(word):
    """A specialist put in and taken out again leaves the others as they were, in proportion."""
    import shutil

    import torch

    from modeling_ultrafuser import UltraFuserForCausalLM

    for file in os.listdir("fused"):
        if not os.path.exists(f"saved/{file}"):
            shutil.copy(f"fused/{file}", "saved")
    command("add", "saved", "c=c", "--out", "more")
    command("remove", "more", "c", "--out", "again")
    more, again, before = (UltraFuserForCausalLM.from_pretrained(f)(ids()) for f in ("more", "again", "saved"))
    assert more.gate_weights.shape[-1] == 3
    assert more.logits.isfinite().all()
    assert torch.allclose(again.gate_weights, before.gate_weights, atol=1e-5)
    assert torch.allclose(again.logits, before.logits, atol=1e-4)


def stage(model, **settings):
    """Stage one for three steps: losses are finite, and whatever the gate has of parameters moves."""
    from datasets import Dataset

    from tests.support.conversations import CHAT_TEMPLATE, conversations
    from tests.support.tiny import tokenizer
    from trainers import GateStageConfig, GateTrainer

    before = [parameter.detach().clone() for parameter in model.model.fusion_gate.parameters()]
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    sizes = {"max_steps": 3, "examples_per_domain": 2, "per_device_train_batch_size": 4, "logging_steps": 1}
    trainer = GateTrainer(
        model,
        GateStageConfig("stage", learning_rate=1e-2, **sizes, **quiet, **settings),
        {name: Dataset.from_list(conversations(6)) for name in model.config.specialist_names},
        processing_class=tokenizer(chat_template=CHAT_TEMPLATE),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    assert not any((p.detach() == q).all() for p, q in zip(model.model.fusion_gate.parameters(), before, strict=True))
    return trainer


def elsewhere(folder):
    """What `strategy` saved says the same in a process that has none of our packages."""
    sys.modules.update(dict.fromkeys(OURS))

    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(f"{folder}/saved", trust_remote_code=True)
    expected, found = load_file(f"{folder}/expected.safetensors"), model(ids())
    assert torch.equal(found.logits, expected["logits"])
    assert torch.equal(found.gate_weights, expected["gate_weights"])


def reward(word):
    """A learned mix follows it."""
    from modeling_ultrafuser import UltraFuserForCausalLM

    specialists("ab")
    model = UltraFuserForCausalLM.from_specialists({"a": "a", "b": "b"})
    trainer = stage(model, mix_reward=word, mix_every=1, mix_delay=1)
    rewarded = [entry for entry in trainer.state.log_history if "reward/a" in entry]
    assert rewarded
    assert all(entry["reward/a"] > 2 * entry["loss/a"] for entry in rewarded)  # a perplexity beside its logarithm


def merge(word):
    """It merges specialists of one shape, and `ultrafuser evaluate` has it among its rows."""
    from tests.support.tiny import specialist
    from ultrafuser.evaluation import contenders
    from ultrafuser.merge.merged_model import merge

    models = {name: specialist() for name in "abc"}
    merged = merge(models, word, base=specialist())
    assert merged(ids()).logits.isfinite().all()
    assert word in contenders.MERGES


def benchmark(module):
    """It runs, and its numbers have a file of their own."""
    import json
    import runpy

    sys.argv = [module, "--rounds", "1"]
    runpy.run_module(f"benchmarks.{module}", run_name="__main__")
    results = os.path.join(sys.path[0], "results", f"{module}.json")
    with open(results) as file:
        assert json.load(file)


def new_command(name):
    """It is listed, and reports errors in sentences."""
    assert name in command("--help")
    specialists("ab")
    command("fuse", "a=a", "b=b", "--out", "fused")
    assert "a" in command(name, "fused")
