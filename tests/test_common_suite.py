"""Transformers' own tests of its models, against fused models. They come from its source distribution."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_fused_models_pass_the_common_tests_of_transformers():
    pytest.importorskip("parameterized")
    command = [sys.executable, str(Path(__file__).parent / "common" / "run.py")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2_000:]
