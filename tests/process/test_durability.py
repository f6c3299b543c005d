"""Commands that are stopped in every way: what `results/durability.json` says holds again."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests import durability
from ultrafuser.cli import app as cli


def holds(found):
    for name, one in found["commands"].items():
        assert one["faults"] == [], name
        assert one["survived"] == one["kills"], name
        assert all(one[kind]["survived"] == one[kind]["sent"] for kind in durability.SIGNALS), name
        assert one["twice"]["held"], name
        disks = one["disks"]
        assert disks["in_a_sentence"] == disks["full"], name
        assert disks["same_with_room"] == len(disks["sizes"]), name
        assert disks["read_only_told"], name


def test_the_run_that_the_documentation_shows_held(tmp_path):
    found = json.loads(durability.RESULTS.read_text())
    holds(found)
    assert set(found["commands"]) == set(durability.commands(tmp_path, tmp_path, ""))
    for one in found["commands"].values():
        # one that writes a single file changes few
        assert one["kills"] >= min(10, one["changes"])
        assert all(one[kind]["sent"] >= 5 for kind in durability.SIGNALS)


@pytest.mark.slow
@pytest.mark.parametrize("command", durability.commands(durability.RESULTS, durability.RESULTS, ""))
def test_a_command_that_is_stopped_anywhere_loses_nothing(command):
    holds(durability.run(kills=2, signals=2, seed=1, only=[command]))


# ---------------------------------------------------------------------------------------------- Ctrl-C


COMMAND = """
import os, signal, sys, time, weakref
from ultrafuser.cli import app as cli

class Thing:
    pass

def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)

@cli.app.command()
def act():
    {}

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["ultrafuser", "act"]
cli.main()
"""
INTERRUPTED = {
    "at work": ("press_ctrl_c()", 130, "Stopped. What was finished is kept.\n"),
    # what Python clears away cannot be interrupted: the exception is lost there, and the command would go on
    "while something is cleared away": (
        "thing = Thing(); weakref.finalize(thing, press_ctrl_c); del thing; time.sleep(20)",
        130,
        "Stopped. What was finished is kept.\n",
    ),
    "when all is done": (
        "thing = Thing(); cli.kept = thing; weakref.finalize(thing, press_ctrl_c)",
        -signal.SIGINT,
        "",
    ),
}


@pytest.mark.grid
@pytest.mark.parametrize("when", INTERRUPTED)
def test_ctrl_c_ends_a_command_without_a_traceback(when):
    act, code, said = INTERRUPTED[when]
    done = subprocess.run([sys.executable, "-c", COMMAND.format(act)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, said)


def test_ctrl_c_before_a_command_is_read_is_told_as_well(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code, capsys.readouterr().err) == (130, "Stopped. What was finished is kept.\n")


# stops itself once it has started processes, and has told which
CLEANING = """
import multiprocessing, os, signal, sys
from pathlib import Path
from ultrafuser.data.cleaning import clean

def records():
    for number in range(1000):
        messages = [{"role": "user", "content": "why"}, {"role": "assistant", "content": f"for {number} reasons " * 9}]
        yield {"messages": messages, "domain": "text", "topic": "", "source": "s", "licence": "mit"}
        if number == 900:
            print(*(process.pid for process in multiprocessing.active_children()), flush=True)
            os.kill(0 if sys.argv[2] == "2" else os.getpid(), int(sys.argv[2]))

signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    clean(records(), Path(sys.argv[1]), processes=2, skip=["language"])
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.grid
@pytest.mark.parametrize(("stop", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, -15), (signal.SIGINT, 130)])
def test_processes_end_with_the_command_that_started_them(stop, code, tmp_path):
    pytest.importorskip("datasketch")
    command = [sys.executable, "-c", CLEANING, tmp_path / "out", str(int(stop))]
    with open(tmp_path / "errors", "w") as errors:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=120, start_new_session=True
        )
    assert done.returncode == code, (tmp_path / "errors").read_text()
    started = [int(pid) for pid in done.stdout.split()]
    assert started
    end = time.monotonic() + 60
    while any(map(runs, started)):
        assert time.monotonic() < end, "processes went on"
        time.sleep(0.05)
    assert "Traceback" not in (tmp_path / "errors").read_text()
    assert not (tmp_path / "out" / ".cleaning").exists() or stop != signal.SIGINT


def runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"
