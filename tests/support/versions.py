"""Which libraries the suite runs on. Elsewhere than on the tested ones a family may lack what tests are about."""

import re
from pathlib import Path

import peft
import pytest
import transformers
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION


PINS = (Path(__file__).parents[2] / "constraints.txt").read_text()
needs_peft_in_the_library = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason=f"transformers asks for PEFT {MIN_PEFT_VERSION}"
)
TESTED = re.search(r"^transformers==(.+)$", PINS, re.MULTILINE)[1] == transformers.__version__
