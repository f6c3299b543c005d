"""A fused model says the same in mlx-lm as in transformers."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_mlx_lm_runs_fused_models_as_transformers_runs_them_or_refuses_in_words():
    command = [sys.executable, str(Path(__file__).parents[1] / "mlx" / "check_mlx.py")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
