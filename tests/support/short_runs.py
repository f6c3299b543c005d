"""Commands as pages show them, in seconds."""

from functools import partial

from trl import DistillationConfig, SFTConfig

from ultrafuser.decoding import choosing
from ultrafuser.evaluation import contenders
from ultrafuser.evaluation.measurement import cost


def make_runs_short() -> None:
    """Trains for two steps on a few examples, on the CPU, whatever a recipe says, and times few tokens, once."""
    for config in (DistillationConfig, SFTConfig):
        _make_short(config)
    contenders.cost = partial(cost, new_tokens=2, repeats=1)
    choosing.ROUNDS = 1


def _make_short(config: type) -> None:
    finish = config.__post_init__

    def short(args):
        args.max_steps, args.per_device_train_batch_size = 2, 2
        args.bf16, args.use_cpu, args.report_to, args.disable_tqdm = False, True, "none", True
        if hasattr(args, "examples_per_domain"):
            args.examples_per_domain, args.mix_every, args.mix_probe = 2, 1, 2
        if hasattr(args, "max_completion_length"):
            args.max_completion_length = 4
        finish(args)

    config.__post_init__ = short
