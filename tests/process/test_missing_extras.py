"""A command whose extra is not installed names it."""

import subprocess
import sys

import pytest


# ---------------------------------------------------------------------------------- what is asked of the model


@pytest.mark.parametrize(
    ("module", "line", "extra"),
    [
        pytest.param("sklearn", "evaluate fused --data text=x.jsonl --out out", "eval", marks=pytest.mark.slow),
        ("datasketch", "data clean x.jsonl --out out", "data"),
        ("fastapi", "serve fused", "serve"),
        ("gradio", "demo fused", "demo"),
    ],
)
def test_a_missing_extra_is_named(module, line, extra):
    script = f"import sys; sys.modules[{module!r}] = None; from ultrafuser.cli import main; main()"
    run = subprocess.run([sys.executable, "-c", script, *line.split()], capture_output=True, text=True)
    assert run.returncode == 2
    assert f"{module!r}, which is not installed" in run.stderr
    assert f"pip install 'ultrafuser[{extra}]'" in run.stderr
    assert "Traceback" not in run.stderr
