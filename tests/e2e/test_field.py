"""The page of the field: its commands run, one after the other, on small stand-ins for models and data."""

import json
import subprocess
import sys

import pytest

from tests.support.field_commands import COMMANDS
from tests.support.pages import NOT_RUN, ROOT


# minutes; what options there are, `tests/repository/test_field.py` sees at once
@pytest.mark.slow
def test_commands_of_the_page_run():
    command = [sys.executable, "-m", "tests.support.field_commands"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [event["command"] + event["error"] for event in events if "error" in event]
    assert [event["command"] for event in events] == COMMANDS
    left = [event for event in events if event["done"] == "parsed"]
    assert {event["why"] for event in left} <= set(NOT_RUN.values())
    assert len(events) > 10 * len(left)
