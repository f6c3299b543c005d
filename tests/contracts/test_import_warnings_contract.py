"""What packages say of themselves when they are imported, and on which logger. No test here runs our code."""

import enum
import logging
import subprocess
import sys

import pytest
from torch.utils import _pytree as pytree


SHOWN = "import logging; logging.basicConfig(format='%(name)s: %(message)s'); "
FAILING = "import torch; torch.ops.load_library = lambda path: 1 / 0; "


def said(code):
    done = subprocess.run([sys.executable, "-c", SHOWN + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


@pytest.mark.e2e
def test_torchao_says_on_its_own_logger_which_of_its_libraries_do_not_load():
    pytest.importorskip("torchao")
    lines = said(FAILING + "import torchao")
    assert any(line.startswith(("torchao: Failed to load ", "torchao: Skipping import of cpp")) for line in lines)


@pytest.mark.e2e
def test_bitsandbytes_says_on_a_logger_of_its_cpu_kernels_that_one_is_missing():
    pytest.importorskip("bitsandbytes")
    lines = said("import bitsandbytes.backends.cpu.ops as ops; print(ops.has_avx512bf16())")
    start = "bitsandbytes.backends.cpu.ops: Failed to load CPU gemm_4bit_forward"
    from bitsandbytes.backends.cpu.ops import has_avx512bf16

    assert any(line.startswith(start) for line in lines) == has_avx512bf16()


def test_torch_says_on_a_logger_of_its_trees_that_an_enum_need_not_be_registered(monkeypatch):
    class Kind(str, enum.Enum):  # noqa: UP042, as torchao has them
        ONE = 1

    records, logger = [], logging.getLogger("torch.utils._pytree")
    # as it is before a command of ours has run in this process
    monkeypatch.setattr(logger, "filters", [])
    logger.addFilter(lambda record: records.append(record))
    pytree.register_constant(Kind)
    assert [record.msg[:23] for record in records] == ["%s is an Enum subclass "]
