"""Stage two: trains gate and specialists together, fully, some of them, or with LoRA (--use_peft).

    python examples/train_joint.py --config examples/recipes/joint.yaml
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/train_joint.py --config ...

Recipes say which specialists to fuse, or which fused folder to go on from, and one dataset per domain. Every field of
`JointStageConfig`, and so of TRL's `SFTConfig`, can stand in the recipe or on the command line.
"""

from fused_data import FusedArguments, load_domains, load_model
from trl import ModelConfig, TrlParser, get_peft_config

from trainers import JointStageConfig, JointTrainer


def main(fused: FusedArguments, args: JointStageConfig, model_args: ModelConfig) -> None:
    """Trains, from a checkpoint if --resume_from_checkpoint says so, and saves a folder that loads anywhere."""
    model, tokenizer = load_model(fused, model_args, trust_remote_code=args.trust_remote_code)
    trainer = JointTrainer(
        model,
        args,
        load_domains(fused),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=resume == "True" or resume)
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main(*TrlParser((FusedArguments, JointStageConfig, ModelConfig)).parse_args_and_config())
