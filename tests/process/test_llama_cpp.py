"""What becomes of fused models says the same in llama.cpp as in transformers."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_llama_cpp_runs_what_commands_make_of_fused_models_as_transformers_runs_it():
    command = [sys.executable, str(Path(__file__).parents[1] / "gguf" / "check_gguf.py")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
