"""Stages in processes of their own: killed and resumed, on two processes, and with their weights in shards."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from transformers import AutoModelForCausalLM

from tests.support.fusions import MIXTURES
from trainers.stage_checkpoint import STATE_FILE


CHECKPOINTS = {"save_strategy": "steps", "save_steps": 2}
LEARNED = {
    "fixed": {},
    "regret": {"mix_reward": "regret", "mix_every": 2, "mix_policy": "rate", "mix_probe": 4},
    "difficulty": {"mix_reward": "difficulty", "mix_every": 2, "mix_policy": "rate", "mix_probe": 4},
}


@contextmanager
def stages(**environment):
    """Runs jobs of `tests.support.stage_run`, in a process that imports the libraries once.

    Yields:
        A function of a list of jobs. Returns the outcome of each, None where it was to be killed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-m", "tests.support.stage_run"], env=environment, **pipes) as process:

        def run(jobs):
            print(json.dumps(jobs), file=process.stdin, flush=True)
            failed = json.loads(process.stdout.readline())
            assert failed is None, failed
            paths = [Path(job["folder"]) / "outcome.pt" for job in jobs]
            return [torch.load(path, weights_only=False) if path.exists() else None for path in paths]

        yield run


@pytest.fixture(scope="module")
def run():
    with stages() as run:
        yield run


def logged(outcome, after=0):
    """What the stage logs; TRL's own count of tokens begins anew in every process."""
    return [{k: v for k, v in e.items() if k != "num_tokens"} for e in outcome["logs"] if e["step"] > after]


def same_weights(one, two):
    return [name for name, tensor in one["weights"].items() if not tensor.equal(two["weights"][name])] == []


def farthest(one, two):
    """Largest difference between two runs' losses, and between their weights."""
    losses = [abs(a["loss"] - b["loss"]) for a, b in zip(one["logs"], two["logs"], strict=True)]
    assert one["weights"].keys() == two["weights"].keys()
    weights = [(t - two["weights"][n]).abs().max().item() for n, t in one["weights"].items()]
    return max(losses), max(weights)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", ["gate", "joint"])
def test_a_killed_run_resumes_to_the_last_bit(stage, processes, run, tmp_path):
    jobs = []
    kinds = {**LEARNED, **({"adapters": {}} if stage == "joint" else {}), **({"shards": {}} if processes == 2 else {})}
    for name, learned in kinds.items():
        settings = {**CHECKPOINTS, **learned, "per_device_train_batch_size": 2 // processes, "max_steps": 8}
        job = {"stage": stage, "processes": processes, "settings": settings, "lora": name == "adapters"}
        if name == "shards":
            job = {**job, "fsdp": True, "settings": {**settings, "fsdp": True}}
        whole, killed = ({**job, "folder": str(tmp_path / f"{name}-{part}")} for part in ("whole", "killed"))
        jobs += [whole, {**killed, "kill_at": 5}, {**killed, "resume": True}]
    found = run(jobs)
    for i, name in enumerate(kinds):
        whole, resumed = found[3 * i], found[3 * i + 2]
        assert min(resumed["draws"]) == 4, "it did not resume from the last checkpoint"
        assert resumed["draws"] == {step: sums for step, sums in whole["draws"].items() if step >= 4}
        assert resumed["mixes"] == whole["mixes"]
        assert resumed["drawn"] == whole["drawn"]
        assert logged(resumed) == logged(whole)
        assert same_weights(resumed, whole)
        if name in ("regret", "difficulty"):
            assert len({tuple(mix) for _, mix in whole["mixes"]}) > 2, "the mix did not move"
        if name == "difficulty":
            assert (resumed["baseline"] == whole["baseline"]).all()


def test_an_unfinished_checkpoint_is_passed_over(run, tmp_path):
    job = {"stage": "gate", "settings": CHECKPOINTS}
    whole, killed = ({**job, "folder": str(tmp_path / part)} for part in ("whole", "killed"))
    whole, _, resumed = run([whole, {**killed, "kill_saving": 4}, {**killed, "resume": True}])
    assert min(resumed["draws"]) == 2
    assert logged(resumed) == logged(whole)
    assert same_weights(resumed, whole)
    assert (tmp_path / "killed" / "checkpoint-4" / STATE_FILE).exists()
    assert (tmp_path / "killed" / "checkpoint-4" / "trainer_state.json").exists(), "it is written anew"


def test_two_processes_are_one_with_the_same_batch(run, tmp_path):
    extra = {"gate_entropy": 0.1, "gate_balance": 0.1, "gate_domain": 0.1, "mix_importance": True}
    folders = [tmp_path / stage for stage in ("gate", "joint")]
    found = run([job for folder in folders for job in one_and_two(folder.name, folder, extra)])
    for i, folder in enumerate(folders):
        check_same(*found[2 * i : 2 * i + 2], folder)


def one_and_two(stage, folder, settings=None, fuse=None, own=None, **of_two):
    """Jobs of one run on one process and of the same on two. Plain descent: Adam would blow up what is rounding."""
    common = {"stage": stage, "fuse": fuse or {}}
    settings = {"max_steps": 4, **CHECKPOINTS, "optim": "sgd", **LEARNED["regret"], **(settings or {})}
    settings["learning_rate"] = 0.1
    own = {"per_device_train_batch_size": 1, **(own or {})}
    return [
        {**common, "folder": str(folder / "one"), "settings": settings},
        {**common, "folder": str(folder / "two"), "settings": {**settings, **own}, "processes": 2, **of_two},
    ]


def check_same(one, two, folder):
    # sorted lists of sums, so that an example drawn on both processes would show
    assert one["draws"] == two["draws"]
    loss, weight = farthest(one, two)
    assert loss < 1e-5
    assert weight < 1e-5
    torch.testing.assert_close([mix for _, mix in one["mixes"]], [mix for _, mix in two["mixes"]], rtol=1e-5, atol=0)
    for a, b in zip(one["logs"], two["logs"], strict=True):
        close = {k: v for k, v in a.items() if k.startswith(("loss/", "gate/", "tokens/", "gate_entropy/", "grad"))}
        assert close == pytest.approx({k: b[k] for k in close}, abs=1e-5)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "two" / "checkpoint-4", trust_remote_code=True)
    assert all(tensor.equal(loaded.state_dict()[name]) for name, tensor in two["weights"].items())


@pytest.mark.parametrize(
    ("fusion", "gate"),
    [("logits", "mlp"), ("probabilities", "mlp"), pytest.param("logits", "evidence", marks=pytest.mark.slow)],
)
def test_weights_in_shards_train_as_whole_ones(fusion, gate, run, tmp_path):
    folders = [tmp_path / stage for stage in ("gate", "joint")]
    fuse, own = {"fusion": fusion, "gate": gate}, {"fsdp": True}
    found = run([job for f in folders for job in one_and_two(f.name, f, fuse=fuse, own=own, fsdp=True)])
    for i, folder in enumerate(folders):
        check_same(*found[2 * i : 2 * i + 2], folder)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", MIXTURES)
def test_weights_in_shards_train_in_bfloat16(fusion, run, tmp_path):
    folders = [tmp_path / stage for stage in ("gate", "joint")]
    settings, own = {"bf16": True, "mix_reward": None}, {"fsdp": True}
    jobs = [j for f in folders for j in one_and_two(f.name, f, settings, {"fusion": fusion}, own, fsdp=True)]
    found = run(jobs)
    for one, two in (found[:2], found[2:]):
        losses = [[entry["loss"] for entry in outcome["logs"]] for outcome in (one, two)]
        assert losses[0] == pytest.approx(losses[1], abs=0.02)
        assert losses[0][-1] < losses[0][0] - 0.05


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", ["gate", "joint"])
def test_weights_in_shards_of_deepspeed_train_as_whole_ones(stage, tmp_path):
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "train_batch_size")
    deepspeed = {"zero_optimization": zero, "zero_allow_untested_optimizer": True, **dict.fromkeys(auto, "auto")}
    jobs = one_and_two(stage, tmp_path, own={"deepspeed": deepspeed, "use_cpu": False})
    with stages(DS_ACCELERATOR="cpu", DS_BUILD_OPS="0") as run:
        one, two = run(jobs)
    check_same(one, two, tmp_path)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_accelerate_reads_its_configuration(name, monkeypatch):
    path = Path(__file__).parents[2] / "examples" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}[name]
    assert config.distributed_type == kind
    assert config.mixed_precision == "bf16"
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    arguments, *_ = _validate_launch_command(arguments)
    assert (arguments.multi_gpu, arguments.use_fsdp, arguments.use_deepspeed) == tuple(
        kind == k for k in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    )
    if name == "fsdp2":
        assert arguments.fsdp_version == 2


def test_what_takes_whole_gradients_is_refused_in_shards(run, tmp_path):
    settings = {"per_device_train_batch_size": 1, "fsdp": True}
    job = {"stage": "joint", "folder": str(tmp_path), "processes": 2, "fsdp": True}
    refused = [
        ({"train_specialists": ["code"]}, "keeps columns of the wide head as they are, which takes a whole head"),
        ({"mix_reward": "gradient"}, "compares whole gradients, which no process holds under FSDP or DeepSpeed"),
    ]
    jobs = [{**job, "settings": {**settings, **extra}, "refused": sentence} for extra, sentence in refused]
    assert run(jobs) == [None, None]
