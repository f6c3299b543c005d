"""Runs commands in processes of their own that can be killed anywhere, while the libraries are imported once.

    with Commands("ultrafuser.build.fusion_recipe", HF_ENDPOINT=server.url) as commands:
        done = commands.run("fuse", ..., under=tmp_path)             # done.code, done.said, done.events
        commands.run("fuse", ..., under=tmp_path, kill_at=7)         # killed at what would be done.events[7]

An event is a change of what is under a folder: a file opened for writing, made, renamed, removed, or handed to a
library that writes it by itself. Killed there, the file is left empty or half written. `commands.kill` kills what runs
now, from another thread. A command can be sent a signal at a time too: `send=signal.SIGINT, after=0.3`.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path


@dataclass
class Done:
    """How a command ended.

    Attributes:
        code: Its exit status, or minus the signal that ended it; None if it was killed.
        said: What it printed, errors first.
        errors: Of that, what it printed as errors.
        events: What it changed, in order: "open config.json". "half model.safetensors" is one that is half written.
        seconds: It took.
        left: Processes that it had started and that were still there ten seconds after it.
    """

    code: int | None
    said: str = ""
    errors: str = ""
    events: list[str] = field(default_factory=list)
    seconds: float = 0.0
    left: int = 0


class Commands:
    """A process that imports modules and then forks a process for each command."""

    def __init__(self, *modules, **environment):
        self.modules = modules
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        self.environment = {**kept, **quiet, **environment}

    def __enter__(self):
        command = [sys.executable, "-m", "tests.support.killing", *self.modules]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=self.environment, **pipes)
        self.running, self.pid = threading.Event(), None
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        self.process.wait()

    def run(self, *words, under="", kill_at=None, send=None, after=0.0, **environment) -> Done:
        job = {"words": [*map(str, words)], "under": str(under), "kill_at": kill_at, "environment": environment}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        self.pid = json.loads(self.process.stdout.readline())
        self.running.set()
        if send is not None:
            timer = threading.Timer(after, self.send, (self.pid, send))
            timer.start()
        done = Done(**json.loads(self.process.stdout.readline()))
        self.running.clear()
        if send is not None:
            timer.cancel()
        return done

    @staticmethod
    def send(pid, number):
        with suppress(ProcessLookupError):
            # a terminal sends it to all of them
            (os.killpg if number == signal.SIGINT else os.kill)(pid, number)

    def kill(self):
        self.running.wait()
        os.kill(self.pid, signal.SIGKILL)


class Events:
    """Lists changes of what is under a folder, and kills this process at one of them."""

    def __init__(self, under, kill_at):
        self.under, self.kill_at, self.seen, self.inside = under, kill_at, [], False

    def watch(self, event, arguments):
        """Hears of every change that Python makes, before it makes it."""
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
        if event == "open":
            changes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not changes or self.inside or not self.is_ours(arguments[0]):
            return
        if self.add(event, arguments[0]):
            if event == "open" and arguments[2] & os.O_TRUNC:
                self.inside = True
                open(arguments[0], "w").close()
            self.die()

    def wrap(self, save):
        """A function that hands a file to a library, (content, path), in two events: before, and half done."""

        def watched(content, path, *args, **kwargs):
            if self.inside or not self.is_ours(path):
                return save(content, path, *args, **kwargs)
            if self.add("save", path):
                self.die()
            self.inside = True
            save(content, path, *args, **kwargs)
            self.inside = False
            if self.add("half", path):
                os.truncate(path, os.path.getsize(path) // 2)
                self.die()

        return watched

    def is_ours(self, path):
        return isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(self.under)

    def add(self, event, path):
        """Whether this is where to die."""
        self.seen.append(f"{event.removeprefix('os.')} {os.path.relpath(path, self.under)}")
        return len(self.seen) - 1 == self.kill_at

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)


def _run(words, under, kill_at, environment, answer):
    """In the forked process: one command as its users run it, and what it changed into a pipe."""
    import torch
    import transformers.modeling_utils as library

    from ultrafuser.cli import app as cli

    os.environ.update(environment)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    events = Events(under, kill_at)
    if under:
        library.safe_save_file, torch.save = events.wrap(library.safe_save_file), events.wrap(torch.save)
        sys.addaudithook(events.watch)
    sys.argv = ["ultrafuser", *words]
    try:
        if words[0] == "load":
            print(_digest(*words[1:]))
        else:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            app = cli.app

            def interruptible():
                # what came before the command began comes now
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
                app()

            cli.app = interruptible
            cli.main()
    finally:
        os.write(answer, json.dumps(events.seen).encode())
        os.close(answer)


def _digest(model, revision, cache):
    """A fingerprint of what a fused model and its tokenizer do, loaded as a user does."""
    import hashlib

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"revision": revision, "cache_dir": cache, "trust_remote_code": True}
    loaded = AutoModelForCausalLM.from_pretrained(model, **where)
    tokenizer = AutoTokenizer.from_pretrained(model, **where)
    logits = loaded(torch.arange(3, 40)[None]).logits.detach().numpy().tobytes()
    words = json.dumps([tokenizer.get_vocab(), tokenizer.chat_template], sort_keys=True).encode()
    return hashlib.sha256(logits + words).hexdigest()


def _use_once():
    """Fuses, saves and loads something, because much is imported and compiled where it is used first."""
    from tempfile import TemporaryDirectory

    from transformers import AutoTokenizer

    from modeling_ultrafuser import UltraFuserForCausalLM
    from tests.support.tiny import specialist, tokenizer
    from ultrafuser.cli.app import app

    app(["push", "--help"], standalone_mode=False)
    with TemporaryDirectory() as folder:
        UltraFuserForCausalLM.from_specialists({n: specialist(layers=1) for n in "ab"}).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        UltraFuserForCausalLM.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)


def _left(group):
    """How many processes of a group there still are after ten seconds."""
    end = time.monotonic() + 10
    while members := _members(group):
        if time.monotonic() > end:
            os.killpg(group, signal.SIGKILL)
            return len(members)
        time.sleep(0.02)
    return 0


def _members(group):
    """Of a group, processes that run."""
    found = []
    for process in os.listdir("/proc"):
        with suppress(OSError, ValueError):
            state, _, its_group = Path(f"/proc/{int(process)}/stat").read_text().rpartition(")")[2].split()[:3]
            found += [process] if int(its_group) == group and state != "Z" else []
    return found


def main():
    """Forks for every line that comes in, and says its process id and how it ended."""
    for module in ("ultrafuser.cli", *sys.argv[1:]):
        import_module(module)
    # what others print is no answer
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _use_once()
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        answers, answer = os.pipe()
        with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
            # nothing comes before the command begins
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            start, pid = time.monotonic(), os.fork()
            os.setpgid(pid, pid)
            if not pid:
                os.dup2(said.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                os.close(answers)
                # its end is that of this whole process: as its users see it
                return _run(**json.loads(line), answer=answer)
            os.close(answer)
            print(json.dumps(pid), file=out, flush=True)
            with os.fdopen(answers) as read:
                events = read.read()
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            seconds, left = time.monotonic() - start, _left(pid)
            errors.seek(0), said.seek(0)
            both = [file.read() for file in (errors, said)]
        done = Done(
            None if code == -signal.SIGKILL else code,
            "".join(both),
            both[0],
            json.loads(events or "[]"),
            seconds,
            left,
        )
        print(json.dumps(asdict(done)), file=out, flush=True)
    return None


if __name__ == "__main__":
    main()
