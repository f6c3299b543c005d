"""Training as pages show it, in seconds."""

from trl import DistillationConfig, SFTConfig


def make_training_short() -> None:
    """Two steps on a few examples, on the CPU, whatever a recipe says."""
    for config in (DistillationConfig, SFTConfig):
        _make_short(config)


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
