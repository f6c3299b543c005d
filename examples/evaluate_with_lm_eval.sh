#!/usr/bin/env bash
# A fused model and each of its specialists on the same tasks of lm-eval, by its own command.
#
#     bash examples/evaluate_with_lm_eval.sh qwen2.5-7B/gate scores --tasks gsm8k,arc_challenge --batch_size 8
#
# Everything behind the two folders goes to lm_eval. `ultrafuser bench` does as much for whole suites, goes on after a
# kill, and runs the paper's.
set -euo pipefail

FUSED=$1 OUT=$2

lm_eval --model hf --model_args "pretrained=$FUSED,trust_remote_code=True" --output_path "$OUT/fused" "${@:3}"
for name in ${SPECIALISTS:-text code math}; do
    ultrafuser specialist "$FUSED" "$name" --out "$OUT/models/$name"
    lm_eval --model hf --model_args "pretrained=$OUT/models/$name" --output_path "$OUT/$name" "${@:3}"
done
