#!/usr/bin/env bash
# Qwen2.5's three models of one size, for text, code and mathematics: from the first look to a server.
#
#     SIZE=1.5B bash examples/qwen2.5.sh
#
# Reads text.jsonl, code.jsonl and math.jsonl from the folder that it is called in, conversations (`messages`) to train
# on, and as many to judge by from held-out/. What it takes, as `ultrafuser check` says, activations not counted:
#
#     SIZE                                     1.5B        7B
#     disk, and memory in bfloat16          10.7 GB   45.7 GB
#     cache of a token                      86.0 kB  172.0 kB
#     to train the gate                     10.7 GB   45.7 GB
#     stage two: everything in float32      85.3 GB  365.6 GB
#     stage two: LoRA                       11.6 GB   47.7 GB
#
# Stage two is examples/lora_stage_two.py, or examples/train_joint.py on several GPUs.
set -euo pipefail

SIZE=${SIZE:-7B}
OUT=${OUT:-qwen2.5-$SIZE}
specialists=(
    "text=${TEXT:-Qwen/Qwen2.5-$SIZE-Instruct}"
    "code=${CODE:-Qwen/Qwen2.5-Coder-$SIZE-Instruct}"
    "math=${MATH:-Qwen/Qwen2.5-Math-$SIZE-Instruct}"
)

# a few megabytes: do they fit, and does this machine?
ultrafuser check "${specialists[@]}"

# mathematics reads 4,096 tokens and has a template of its own: the first is told, the second chosen
ultrafuser fuse "${specialists[@]}" --chat-template text --dry-run
ultrafuser fuse "${specialists[@]}" --chat-template text --dtype bfloat16 --out "$OUT/fused"

ultrafuser train --stage gate --model "$OUT/fused" --out "$OUT/gate" --dtype bfloat16 \
    --data text=text.jsonl --data code=code.jsonl --data math=math.jsonl \
    --max-steps "${STEPS:-400}" --examples-per-domain "${EXAMPLES:-64}" --per-device-train-batch-size 2 \
    --max-length 2048 --assistant-only-loss true --report-to none

# is it worth it? and who speaks where?
ultrafuser evaluate "$OUT/gate" --out "$OUT/evaluated" \
    --data text=held-out/text.jsonl --data code=held-out/code.jsonl --data math=held-out/math.jsonl
ultrafuser explain "$OUT/gate" "Write a function that returns the sum of the first n odd numbers, and prove it." \
    --generate 100

ultrafuser serve "$OUT/gate" --port 8000
