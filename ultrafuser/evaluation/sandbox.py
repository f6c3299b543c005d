"""Runs a Python snippet in a process of its own, with limits, and says what came of it.

This file is also the script that runs there. What holds the snippet:

- `python -I -S`, an empty environment, an empty working folder that is deleted afterwards, no open file of the caller's;
- limits on wall time and, by the kernel, on processor time, memory, the size of a file and of what it prints, and open
  files;
- a seccomp filter: no programs, no processes, no sockets, no signals to others (x86-64 and ARM);
- an audit hook that refuses to read or change files outside the working folder but for the interpreter's own;
- where `bwrap` (bubblewrap) can be used: a file system that holds the interpreter and the working folder only, which is
  limited in size, and namespaces of processes and network of its own. `confinement()` says whether it is.

Without `bwrap` the audit hook alone keeps the files, and a snippet written for the purpose gets round it, because it
shares the interpreter with it; nor is there a limit on all files together. With or without, it can forge its own value.
Run what you do not trust at all in a virtual machine. Linux only.
"""

import contextlib
import functools
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import NamedTuple


MEBIBYTE = 2**20
LONGEST_FILE = MEBIBYTE  # bytes, of each file that the snippet writes, and of all that it prints
LONGEST_FOLDER = 16 * MEBIBYTE  # bytes, of all files together, where `bwrap` is
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
READS = {"os.listdir": 0, "os.scandir": 0}
REFUSED = ("ctypes.", "os.exec", "os.fork", "os.kill", "os.posix_spawn", "os.system", "pty.", "socket.", "subprocess.")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Outcome(NamedTuple):
    """Outcome of a snippet.

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
            _command(folder, confined=_bwrap_works()),
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


def confinement() -> str:
    """Describes the sandbox of this machine, for result files."""
    return (
        "bwrap, seccomp, limits and an audit hook"
        if _bwrap_works()
        else "seccomp, limits and an audit hook; no bwrap, so that files outside are kept by the hook alone"
    )


@functools.cache
def _bwrap_works() -> bool:
    # it may be there, and the kernel or a container forbid what it needs
    if shutil.which("bwrap") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        command = [*_command(folder, confined=True)[:-1], "-c", "pass"]
        try:
            return subprocess.run(command, capture_output=True, env={}, timeout=60).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            return False


def _command(folder: str, confined: bool) -> list[str]:
    """Python running this file, in a file system and namespaces of its own or not."""
    python = os.path.realpath(sys.executable)
    script = os.path.abspath(__file__)
    options = ["-I", "-S", "-B"]
    if not confined:
        return [python, *options, script]
    read = dict.fromkeys([os.path.join(sys.base_prefix, "lib"), python, script])
    read |= dict.fromkeys(path for path in ("/usr/lib", "/usr/lib64", "/etc/ld.so.cache") if os.path.exists(path))
    binds = [word for path in read for word in ("--ro-bind", os.path.realpath(path), path)]
    for path in ("/lib", "/lib64", "/lib32"):
        if os.path.islink(path):
            binds += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            binds += ["--ro-bind", path, path]
    return [
        *("bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"),
        *binds,
        *("--proc", "/proc", "--dev-bind", "/dev/null", "/dev/null"),
        *("--size", str(LONGEST_FOLDER), "--tmpfs", os.path.realpath(folder), "--remount-ro", "/"),
        *("--chdir", os.path.realpath(folder), "--", python, *options, script),
    ]


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
    # nothing that it could start would have these
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(request["report"], False)
    _leave_network()
    _limit(request["seconds"], request["bytes"])
    _forbid_calls()
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


# system calls by machine: the filter's name of it, what is refused, `clone`, `clone3` and `tgkill`
_CALLS = {
    "x86_64": (
        0xC000003E,
        # fork, vfork, execve, execveat; socket, socketpair; kill, tkill, rt_sigqueueinfo, pidfd_send_signal
        (57, 58, 59, 322, 41, 53, 62, 200, 129, 424)
        # ptrace, process_vm_*, mknod*, setxattr*, mount, umount2, unshare, setns, chroot, pivot_root, mount's successors
        + (101, 310, 311, 133, 259, 188, 189, 190, 165, 166, 272, 308, 161, 155, *range(428, 434), 442)
        # bpf, perf_event_open, io_uring_*, open_by_handle_at, userfaultfd, keys, modules, clocks, reboot
        + (321, 298, 425, 426, 427, 304, 323, 248, 249, 250, 175, 176, 313, 246, 164, 227, 159, 169, 170, 171),
        (56, 435, 234),
    ),
    "aarch64": (
        0xC00000B7,
        (221, 281, 198, 199, 129, 130, 138, 424)
        + (117, 270, 271, 33, 5, 6, 7, 40, 39, 97, 268, 51, 41, *range(428, 434), 442)
        + (280, 241, 425, 426, 427, 265, 282, 217, 218, 219, 105, 106, 273, 104, 170, 112, 171, 142, 161, 162),
        (220, 435, 131),
    ),
}


def _forbid_calls() -> None:
    """A seccomp filter, where the machine is known: no programs, processes, sockets, or signals to others."""
    import ctypes
    import struct

    if platform.machine() not in _CALLS:
        return
    machine, refused, (clone, clone3, tgkill) = _CALLS[platform.machine()]
    allow, refuse, unknown = 0x7FFF0000, 0x00050001, 0x00050026
    load, equal, at_least, has, give = 0x20, 0x15, 0x35, 0x45, 0x06
    program = [
        *((load, 0, 0, 4), (equal, 1, 0, machine), (give, 0, 0, refuse)),
        *((load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (give, 0, 0, refuse)),
        *(step for call in refused for step in ((equal, 0, 1, call), (give, 0, 0, refuse))),
        # threads fall back to `clone`, whose flags can be read
        *((equal, 0, 1, clone3), (give, 0, 0, unknown)),
        *((equal, 0, 3, tgkill), (load, 0, 0, 16), (equal, 1, 0, os.getpid()), (give, 0, 0, refuse)),
        *((load, 0, 0, 0), (equal, 0, 3, clone), (load, 0, 0, 16), (has, 1, 0, 0x10000), (give, 0, 0, refuse)),
        (give, 0, 0, allow),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    library = ctypes.CDLL(None, use_errno=True)
    # a process that gains no rights may filter itself
    library.prctl(38, 1, 0, 0, 0)
    if library.prctl(22, 2, ctypes.byref(header), 0, 0):
        sys.stderr.write(f"The kernel takes no seccomp filter: {os.strerror(ctypes.get_errno())}.\n")


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

    needed = {sys.base_prefix, os.path.dirname(os.__file__), "/usr/lib", "/lib", f"/proc/{os.getpid()}"}
    readable = tuple(os.path.realpath(path) + os.sep for path in (*needed, folder))

    def check_read(path) -> None:
        found = "" if isinstance(path, int) else os.path.realpath(os.fsdecode(path))
        if found and found != os.devnull and not (found + os.sep).startswith(readable):
            raise PermissionError(f"A snippet reads files in its own folder only, but this was {found!r}.")

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
        elif event == "open":
            check_read(arguments[0])
        if event in READS and arguments[0] is not None:
            check_read(arguments[0])
        for path, relative_to in CHANGES.get(event, ()):
            check(arguments[path], -1 if relative_to is None else arguments[relative_to])

    return hook


if __name__ == "__main__":
    _main()
