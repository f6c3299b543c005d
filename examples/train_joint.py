"""Stage two: trains gate and specialists together, fully, some of them, or with LoRA (--use_peft).

    python examples/train_joint.py --config examples/recipes/joint.yaml
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/train_joint.py --config ...

Recipes say which specialists to fuse, or which fused folder to go on from, and one dataset per domain. Every field of
`JointStageConfig`, and so of TRL's `SFTConfig`, can stand in the recipe or on the command line. On one device
`ultrafuser train RECIPE` does the same.
"""

import sys

from ultrafuser.train.stage_recipe import parse, train


if __name__ == "__main__":
    train(*parse(sys.argv[1:], stage="joint"))
