#!/usr/bin/env bash
# One more specialist into a fused model: the others stay as they are, and the gate keeps what it learned about them.
#
#     bash examples/add_a_specialist.sh qwen2.5-7B/gate medicine=OWNER/MODEL
#
# Reads one file of conversations for each domain, the new one's too, from the folder that it is called in, and writes
# a new folder: the old one stays. `ultrafuser remove` is the way back.
set -euo pipefail

FUSED=$1 NEW=$2 OUT=${3:-with-${2%%=*}}
name=${NEW%%=*}

# does it share the tokenizer, and have all rows of the fused vocabulary? `add` asks before it reads weights
ultrafuser add "$FUSED" "$NEW" --out "$OUT/fused"

# until now nothing has shown the gate when the newcomer is right
ultrafuser train --stage gate --model "$OUT/fused" --out "$OUT/gate" \
    --data text=text.jsonl --data code=code.jsonl --data math=math.jsonl --data "$name=$name.jsonl" \
    --max-steps "${STEPS:-400}" --examples-per-domain "${EXAMPLES:-64}" --per-device-train-batch-size 2 \
    --max-length 2048 --assistant-only-loss true --report-to none
