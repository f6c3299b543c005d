"""A snippet's value comes back; what it must not do, it cannot, and the caller goes on."""

import contextlib
import os
import platform
import re
import socket
import sys
import time
from pathlib import Path

import pytest

from ultrafuser.evaluation import sandbox
from ultrafuser.evaluation.sandbox import run


@pytest.fixture(autouse=True, params=["bwrap", "no bwrap"])
def _with_and_without(request, monkeypatch):
    if request.param == "no bwrap":
        monkeypatch.setattr(sandbox, "_bwrap_works", lambda: False)
    elif not sandbox._bwrap_works():
        pytest.skip("bwrap cannot be used here")


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
    # where the file is not there at all, what looks for it first says so
    assert re.search("in its own folder only|No such file", outcome.printed)
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


def unguarded(monkeypatch, tmp_path, *parts):
    """As if a part had been got round."""
    source = Path(sandbox.__file__).read_text()
    for part in parts:
        assert part in source
        source = source.replace(part, "    str")
    (tmp_path / "weak").mkdir()
    (tmp_path / "weak" / "sandbox.py").write_text(source)
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "weak" / "sandbox.py"))


def test_what_it_left_running_is_killed(monkeypatch, tmp_path):
    unguarded(monkeypatch, tmp_path, "    sys.addaudithook", "    _forbid_calls()")
    outcome = run(
        "import os, time\nif not os.fork():\n    os.setsid() if BWRAP else 0\n    time.sleep(600)".replace(
            "BWRAP", str(sandbox._bwrap_works())
        ),
        "1",
    )
    # who is not root is held by the limit on processes already
    assert outcome.status == "passed" or "Resource temporarily unavailable" in outcome.printed
    deadline = time.monotonic() + 60
    while running(tmp_path / "weak") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(tmp_path / "weak")


def running(folder):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [path] if str(folder).encode() in path.read_bytes() else []
    return found


@pytest.mark.parametrize(
    "start",
    [
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "import _posixsubprocess as p; p.fork_exec([b'/bin/true'], [b'/bin/true'], True, (), None, None, "
        "-1, -1, -1, -1, -1, -1, *os.pipe(), False, False, -1, None, None, None, -1, None, False)",
        "import socket; socket.socket()",
        "import socket; socket.socketpair()",
        "os.kill(os.getppid(), 9)",
        "import ctypes; assert ctypes.CDLL(None).syscall(57) >= 0, 'not permitted'",
    ],
)
def test_without_the_hook_the_kernel_refuses_processes_and_sockets(start, monkeypatch, tmp_path):
    if platform.machine() not in sandbox._CALLS:
        pytest.skip("no filter for this machine")
    unguarded(monkeypatch, tmp_path, "    sys.addaudithook")
    outcome = run(f"import os\n{start}", "1")
    assert outcome.status == "error"
    assert re.search("not permitted|Permission|No such file", outcome.printed)
    # threads are no processes
    assert (
        run("import threading as t\nx = t.Thread(target=print)\nx.start()\nx.join()", "x.is_alive()").value == "False"
    )


@pytest.mark.parametrize(
    "read",
    [
        "open('/proc/%d/environ' % PARENT, 'rb').read()",
        "open({file!r}).read()",
        "os.listdir({folder!r})",
        "list(os.scandir({folder!r}))",
        "open('/etc/passwd').read()",
        "os.read(os.open({file!r}, os.O_RDONLY), 100)",
        "__import__('pathlib').Path({file!r}).read_text()",
    ],
)
def test_files_outside_its_folder_are_not_read(read, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (tmp_path / "file").write_text("secret")
    read = read.format(file=str(tmp_path / "file"), folder=str(tmp_path))
    outcome = run(f"import os\nPARENT = {os.getpid()}\nvalue = {read}", "value")
    assert outcome.status == "error"
    assert "secret" not in outcome.value


ROUND_THE_HOOK = [
    "fd = os.open(FOLDER, os.O_RDONLY)\nos.close(os.open('kept', os.O_WRONLY | os.O_TRUNC, dir_fd=fd))",
    "import sqlite3; sqlite3.connect(FOLDER + '/new').execute('create table t (x)')",
    "os.mkfifo(FOLDER + '/new')",
    "os.mknod(FOLDER + '/new')",
    "os.fchmod(os.open(FOLDER + '/kept', os.O_RDONLY), 0)",
    "os.setxattr(FOLDER + '/kept', 'user.x', b'1')",
    "import readline; readline.add_history('x'); readline.write_history_file(FOLDER + '/new')",
    "open(FOLDER + '/kept', 'w')",
    "open('/dev/shm/ultrafuser-test', 'w')",
]


@pytest.mark.parametrize("change", ROUND_THE_HOOK)
def test_in_bwrap_files_outside_do_not_exist_even_without_the_hook(change, tmp_path, monkeypatch):
    if not sandbox._bwrap_works():
        pytest.skip("bwrap cannot be used here")
    unguarded(monkeypatch, tmp_path, "    sys.addaudithook")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("as it was")
    before = (outside / "kept").stat()
    outcome = run(f"import os\nFOLDER = {str(outside)!r}\n{change}", "1")
    assert outcome.status == "error"
    assert [p.name for p in outside.iterdir()] == ["kept"]
    assert (outside / "kept").read_text() == "as it was"
    assert (outside / "kept").stat().st_mode == before.st_mode
    assert not Path("/dev/shm/ultrafuser-test").exists()


def test_in_bwrap_all_files_together_are_limited(tmp_path):
    if not sandbox._bwrap_works():
        pytest.skip("bwrap cannot be used here")
    fill = "for i in range(40):\n    open(str(i), 'wb').write(bytes(2**20))"
    outcome = run(fill, "1")
    assert outcome.status == "error"
    assert "No space left" in outcome.printed


def test_no_file_of_the_callers_is_open_in_it(tmp_path):
    with (tmp_path / "mine").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        listed = run(
            "import os", "sorted(os.path.realpath(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd'))"
        )
    assert listed.status == "passed", listed.printed
    assert "mine" not in listed.value
    assert run("import os", "os.read(0, 10)").value == "b''"


def test_it_is_said_what_holds_a_snippet(monkeypatch):
    assert ("no bwrap" in sandbox.confinement()) == (not sandbox._bwrap_works())
    monkeypatch.setattr(sandbox, "_bwrap_works", lambda: False)
    assert "kept by the hook alone" in sandbox.confinement()
