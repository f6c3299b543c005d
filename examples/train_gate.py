"""Stage one: trains the gate of a fused model and leaves every specialist as it is.

    python examples/train_gate.py --config examples/recipes/gate.yaml
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/train_gate.py --config ...

With a learned mix of the domains: --config examples/recipes/learned_mix.yaml

Recipes say which specialists to fuse, or which fused folder to go on from, and one dataset per domain. Every field of
`GateStageConfig`, and so of TRL's `SFTConfig`, can stand in the recipe or on the command line.
"""

from fused_data import FusedArguments, load_domains, load_model
from trl import ModelConfig, TrlParser

from trainers import GateStageConfig, GateTrainer


def main(fused: FusedArguments, args: GateStageConfig, model_args: ModelConfig) -> None:
    """Trains, from a checkpoint if --resume_from_checkpoint says so, and saves a folder that loads anywhere."""
    model, tokenizer = load_model(fused, model_args, trust_remote_code=args.trust_remote_code)
    trainer = GateTrainer(
        model,
        args,
        load_domains(fused),
        processing_class=tokenizer,
    )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=resume == "True" or resume)
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main(*TrlParser((FusedArguments, GateStageConfig, ModelConfig)).parse_args_and_config())
