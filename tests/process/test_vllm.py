"""A fused model says the same in vLLM as in transformers."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("script", ["check_vllm.py", "features.py"])
def test_vllm_serves_fused_models_as_transformers_runs_them_or_refuses_in_words(script):
    command = [sys.executable, str(Path(__file__).parents[1] / "vllm" / script)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
