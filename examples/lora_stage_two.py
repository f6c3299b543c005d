"""Stage two through LoRA: adapters and gate are trained, then merged into a folder like any other.

    python examples/lora_stage_two.py examples/recipes/joint_lora.yaml --output_dir adapters

writes the adapters, and the whole model into `adapters/merged`. Every field of `JointStageConfig` and of TRL's
`ModelConfig` can stand in the recipe or on the command line.
"""

import sys
from pathlib import Path

from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from ultrafuser.train.stage_recipe import parse, train


def main(recipe: str, *arguments: str) -> None:
    """Trains what a recipe says and merges what came out."""
    fused, args, model_args = parse(list(arguments), recipe=Path(recipe))
    train(fused, args, model_args)
    model = AutoPeftModelForCausalLM.from_pretrained(args.output_dir, dtype=model_args.dtype, trust_remote_code=True)
    merged = Path(args.output_dir, "merged")
    model.merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(args.output_dir, trust_remote_code=True).save_pretrained(merged)


if __name__ == "__main__":
    main(*sys.argv[1:])
