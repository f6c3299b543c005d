"""Which libraries the suite runs on. Elsewhere than on the tested ones a family may lack what tests are about."""

import re
from pathlib import Path

import transformers


PINS = (Path(__file__).parent.parent / "constraints.txt").read_text()
TESTED = re.search(r"^transformers==(.+)$", PINS, re.MULTILINE)[1] == transformers.__version__
