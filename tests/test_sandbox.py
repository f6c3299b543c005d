"""A snippet's value comes back; what it must not do, it cannot, and the caller goes on."""

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from ultrafuser.evaluation import sandbox
from ultrafuser.evaluation.sandbox import run


def test_the_value_of_the_expression_comes_back():
    assert run("def double(x):\n    return 2 * x", "double('ab')") == ("passed", "'abab'", "")


def test_what_a_snippet_prints_is_not_its_value():
    assert run("print('seen')", "1 + 1") == ("passed", "2", "seen\n")


def test_an_exception_is_told():
    outcome = run("1 / 0")
    assert outcome.status == "error"
    assert outcome.printed.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("code", ["import sys; sys.exit(0)", "import os; os._exit(0)", "def"])
def test_a_snippet_that_does_not_reach_its_end_has_not_passed(code):
    assert run(code, "1").status == "error"


@pytest.mark.parametrize("code", ["while True:\n    pass", "import time; time.sleep(60)"])
def test_what_does_not_end_is_ended(code):
    assert run(code, seconds=0.5).status == "timeout"


def test_memory_is_limited():
    outcome = run("data = bytearray(2**28)", "len(data)", megabytes=128)
    assert (outcome.status, outcome.printed.splitlines()[-1]) == ("error", "MemoryError")
    assert run("data = bytearray(2**28)", "len(data)", megabytes=512).value == str(2**28)


def test_a_file_is_limited():
    assert run("open('big', 'wb').write(bytes(2**20))", "1").status == "passed"
    outcome = run("with open('big', 'wb', 0) as file:\n    file.write(bytes(2**20))\n    file.write(b'more')", "1")
    assert outcome.printed.endswith("OSError: [Errno 27] File too large\n")


def test_of_a_long_output_the_end_is_kept():
    outcome = run("for i in range(10**5):\n    print(i)", "1")
    assert outcome.printed.endswith("\n99999\n")
    assert len(outcome.printed) == sandbox.TAIL


def test_an_endless_output_ends():
    outcome = run("while True:\n    print('x' * 1000)", "1")
    assert outcome.status == "error"
    assert len(outcome.printed) <= sandbox.TAIL


@pytest.mark.parametrize(
    "start",
    [
        "import os\nwhile True:\n    os.fork()",
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', '1'])",
        "import os\nos.system('true')",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
    ],
)
def test_no_process_is_started(start):
    outcome = run(start, "1", seconds=20)
    assert outcome.status == "error"
    assert "starts no programs" in outcome.printed


@pytest.mark.parametrize(
    "change",
    [
        "open({0!r}, 'w')",
        "open({0!r}, 'r+')",
        "import os; os.remove({0!r})",
        "import os; os.rename({0!r}, 'mine')",
        "import os; os.symlink({0!r}, 'link'); open('link', 'w')",
        "import pathlib; pathlib.Path({0!r}).unlink()",
        "import os; os.chmod({0!r}, 0)",
        "import shutil; shutil.rmtree({1!r})",
    ],
)
def test_nothing_outside_its_folder_changes(change, tmp_path):
    file = tmp_path / "kept"
    file.write_text("as it was")
    before = file.stat()
    outcome = run(change.format(str(file), str(tmp_path)), "1")
    assert outcome.status == "error"
    assert "in its own folder only" in outcome.printed
    assert file.read_text() == "as it was"
    assert file.stat().st_mode == before.st_mode


def test_its_own_folder_is_its_own_and_goes_away():
    code = (
        "import os, shutil\nopen('a', 'w').write('1')\nos.rename('a', 'b')\nos.makedirs('c/d')\nshutil.rmtree('c/d')"
    )
    outcome = run(code, "(sorted(os.listdir()), os.getcwd())")
    listed, folder = eval(outcome.value)
    assert listed == ["b", "c"]
    assert not os.path.exists(folder)


def test_the_network_is_not_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        outcome = run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))", "1")
        with pytest.raises(TimeoutError):
            server.accept()
    assert outcome.status == "error"


def test_it_knows_nothing_of_the_callers_environment(monkeypatch):
    monkeypatch.setenv("TOKEN", "secret")
    assert run("import os", "os.environ.get('TOKEN')").value == "None"
    assert run("import torch").status == "error"


def test_when_the_limits_cannot_be_set_nothing_runs():
    with pytest.raises(RuntimeError, match="could not be set"):
        run("1", megabytes=10**15)


def test_where_the_kernel_allows_it_there_is_no_network_at_all():
    code = "import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x50000000) != 0)"
    if os.waitstatus_to_exitcode(os.system(f"{sys.executable} -c '{code}'")):
        pytest.skip("users may not make namespaces here")
    assert run("names = open('/proc/net/dev').read()", "names.count(':')").value == "1"  # the loopback, which is down


def test_what_it_left_running_is_killed(monkeypatch, tmp_path):
    # as if the hook had been got round; a writer that lives keeps the pipe open
    unguarded = tmp_path / "sandbox.py"
    unguarded.write_text(Path(sandbox.__file__).read_text().replace("    sys.addaudithook", "    str"))
    monkeypatch.setattr(sandbox, "__file__", str(unguarded))
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    code = f"import os, time\nos.write(os.open({str(tmp_path / 'pipe')!r}, os.O_WRONLY), b'alive')"
    outcome = run(code + "\nif not os.fork():\n    time.sleep(600)", "1")
    # who is not root is held by the limit on processes already
    assert outcome.status == "passed" or "Resource temporarily unavailable" in outcome.printed
    assert os.read(reader, 100) == b"alive"
    deadline = time.monotonic() + 60
    while (ended := at_end(reader)) is False and time.monotonic() < deadline:
        time.sleep(0.01)
    os.close(reader)
    assert ended


def at_end(reader):
    try:
        return os.read(reader, 1) == b""
    except BlockingIOError:
        return False
