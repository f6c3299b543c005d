"""Runs a Python snippet in a process of its own, with limits, and says what came of it.

This file is also the script that runs there. What holds the snippet:

- `python -I -S`, an empty environment, an empty working folder that is deleted afterwards;
- limits on wall time and, by the kernel, on processor time, memory, the size of a file and of what it prints, open
  files and, unless root runs it, processes;
- a network namespace without a network, where the kernel lets users make one;
- an audit hook that refuses to change files outside the working folder, to open sockets and to start programs.

It is made for what language models write by mistake, not for an attacker. The snippet may read whatever the user
may read; it shares its interpreter with the audit hook and with the code that reports the value, so a snippet written
for the purpose can get round the former and forge the latter. Run what you do not trust at all in a container or a
virtual machine. Linux only.
"""

import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
from typing import NamedTuple


MEBIBYTE = 2**20
LONGEST_FILE = MEBIBYTE  # bytes, of each file that the snippet writes, and of all that it prints
OPEN_FILES = 32
TAIL = 2000  # characters of what was printed that are kept

# audit events that change files: where among their arguments each path is, and the open folder that it is relative to
CHANGES = {
    "os.chmod": [(0, 2)],
    "os.chown": [(0, 3)],
    "os.link": [(0, 2), (1, 3)],
    "os.mkdir": [(0, 2)],
    "os.remove": [(0, 1)],
    "os.rename": [(0, 2), (1, 3)],
    "os.rmdir": [(0, 1)],
    "os.symlink": [(1, 2)],
    "os.truncate": [(0, None)],
    "os.utime": [(0, 3)],
}
REFUSED = ("ctypes.", "os.exec", "os.fork", "os.kill", "os.posix_spawn", "os.system", "pty.", "socket.", "subprocess.")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Outcome(NamedTuple):
    """What came of a snippet.

    Attributes:
        status: "passed", "error" or "timeout".
        value: `repr` of the expression's value if it passed, else empty.
        printed: The end of what it wrote to its standard output and error, such as a traceback.
    """

    status: str
    value: str
    printed: str


def run(code: str, expression: str = "None", *, seconds: float = 5, megabytes: int = 512) -> Outcome:
    """Executes `code`, then evaluates `expression` in what it defined.

    Args:
        code: The snippet.
        expression: What to evaluate afterwards.
        seconds: Wall time after which all of its processes are killed; also the limit on processor time.
        megabytes: Limit on its address space, in mebibytes. Python itself takes about 20.

    Raises:
        RuntimeError: If the limits could not be set, so that no snippet was run.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile() as printed,
        tempfile.TemporaryFile() as report,
    ):
        request = {"code": code, "expression": expression, "seconds": math.ceil(seconds)}
        request |= {"bytes": megabytes * MEBIBYTE, "report": report.fileno()}
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", os.path.abspath(__file__)],
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=printed,
            cwd=folder,
            env={},
            pass_fds=[report.fileno()],
            start_new_session=True,
        )
        late = False
        try:
            process.communicate(json.dumps(request).encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            # what it started lives on in its group
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return _outcome(_content(report), _content(printed)[-TAIL:], late, process.returncode)


def _content(file) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _outcome(report: str, printed: str, late: bool, code: int) -> Outcome:
    # the processor time is over
    if late or code == -signal.SIGXCPU:
        return Outcome("timeout", "", printed)
    ready, _, value = report.partition("\n")
    if not ready:
        raise RuntimeError(
            f"No snippet is run without its limits, but they could not be set, or Python did not start. It said:\n"
            f"{printed}"
        )
    return Outcome("passed", json.loads(value), printed) if value and code == 0 else Outcome("error", "", printed)


def _main() -> None:
    # in the process of the snippet
    request = json.load(sys.stdin)
    _leave_network()
    _limit(request["seconds"], request["bytes"])
    os.write(request["report"], b"ready\n")
    sys.addaudithook(_guard(os.path.realpath(".")))
    names = {"__name__": "__main__"}
    exec(compile(request["code"], "<snippet>", "exec"), names)
    value = repr(eval(request["expression"], names))
    sys.stdout.flush()
    os.write(request["report"], json.dumps(value).encode())
    # nothing that the snippet left behind runs at exit
    os._exit(0)


def _leave_network() -> None:
    # os.unshare is there from Python 3.12
    import ctypes

    new_user, new_network = 0x10000000, 0x40000000
    # where it is forbidden, the audit hook is what remains
    ctypes.CDLL(None).unshare(new_user | new_network)


def _limit(seconds: int, memory: int) -> None:
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: LONGEST_FILE,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))


def _guard(folder: str):
    """The audit hook."""

    def check(path, relative_to: int = -1) -> None:
        # a number is a file that is open already
        if isinstance(path, int):
            return
        start = "" if relative_to == -1 else os.readlink(f"/proc/self/fd/{relative_to}")
        found = os.path.realpath(os.path.join(start, os.fsdecode(path)))
        if found != folder and not found.startswith(folder + os.sep):
            raise PermissionError(f"A snippet changes files in its own folder only, but this was {found!r}.")

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(f"A snippet uses no network and starts no programs, but this was {event!r}.")
        if event == "open" and arguments[2] & WRITING:
            check(arguments[0])
        for path, relative_to in CHANGES.get(event, ()):
            check(arguments[path], -1 if relative_to is None else arguments[relative_to])

    return hook


if __name__ == "__main__":
    _main()
