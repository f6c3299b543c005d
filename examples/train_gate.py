"""Stage one: trains the gate of a fused model and leaves every specialist as it is.

    python examples/train_gate.py --config examples/recipes/gate.yaml
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/train_gate.py --config ...

With a learned mix of the domains: --config examples/recipes/learned_mix.yaml

Recipes say which specialists to fuse, or which fused folder to go on from, and one dataset per domain. Every field of
`GateStageConfig`, and so of TRL's `SFTConfig`, can stand in the recipe or on the command line. On one device
`ultrafuser train RECIPE` does the same.
"""

import sys

from ultrafuser.train.stage_recipe import parse, train


if __name__ == "__main__":
    train(*parse(sys.argv[1:], stage="gate"))
