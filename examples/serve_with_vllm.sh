#!/usr/bin/env bash
# A fused model behind vLLM's OpenAI server, asked once.
#
#     bash examples/serve_with_vllm.sh qwen2.5-7B/gate --max-model-len 4096
#
# vLLM pins its torch and transformers, so it has an environment of its own, in which UltraFuser need not be:
# `python -m venv vllm && vllm/bin/pip install vllm`, and then VLLM=vllm/bin/vllm. Everything behind the folder goes to
# vLLM. Specialists of unequal heads, windows or kinds of attention are refused when it loads; `ultrafuser check` says
# so before.
set -euo pipefail

FUSED=$1 PORT=${PORT:-8000}

"${VLLM:-vllm}" serve "$FUSED" --trust-remote-code --served-model-name fused --port "$PORT" "${@:2}" &
server=$!
trap 'kill $server' EXIT

until curl -sf "http://localhost:$PORT/health"; do
    sleep 1
    # it says why when it ends
    kill -0 $server
done
curl -sf "http://localhost:$PORT/v1/chat/completions" -H "Content-Type: application/json" \
    -d '{"model": "fused", "messages": [{"role": "user", "content": "What is 47 * 36?"}], "max_tokens": 64}'
