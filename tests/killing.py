"""Runs commands in processes of their own that can be killed anywhere, while the libraries are imported once.

    with Commands("ultrafuser.fusing", HF_ENDPOINT=server.url) as commands:
        done = commands.run("fuse", ..., under=tmp_path)             # done.code, done.said, done.events
        commands.run("fuse", ..., under=tmp_path, kill_at=7)         # killed at what would be done.events[7]

An event is a change of what is under a folder: a file opened for writing, made, renamed, removed, or handed to a
library that writes it by itself. Killed there, the file is left empty or half written. `commands.kill` kills what runs
now, from another thread.
"""

import gc
import io
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module


@dataclass
class Done:
    """How a command ended.

    Attributes:
        code: Its exit status; None if it was killed.
        said: What it printed.
        events: What it changed, in order: "open config.json". "half model.safetensors" is one that is half written.
    """

    code: int | None
    said: str = ""
    events: list[str] = field(default_factory=list)


class Commands:
    """A process that imports modules and then forks a process for each command."""

    def __init__(self, *modules, **environment):
        self.modules = modules
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        self.environment = {**kept, **quiet, **environment}

    def __enter__(self):
        command = [sys.executable, "-m", "tests.killing", *self.modules]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=self.environment, **pipes)
        self.running, self.pid = threading.Event(), None
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        self.process.wait()

    def run(self, *words, under="", kill_at=None, **environment) -> Done:
        job = {"words": [*map(str, words)], "under": str(under), "kill_at": kill_at, "environment": environment}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        self.pid = json.loads(self.process.stdout.readline())
        self.running.set()
        done = Done(**json.loads(self.process.stdout.readline()))
        self.running.clear()
        return done

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
    """In the forked process: one command, and how it ended into a pipe."""
    import torch
    import transformers.modeling_utils as library

    from ultrafuser.cli import app

    os.environ.update(environment)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    events = Events(under, kill_at)
    if under:
        library.safe_save_file, torch.save = events.wrap(library.safe_save_file), events.wrap(torch.save)
        sys.addaudithook(events.watch)
    said, code = io.StringIO(), 0
    with redirect_stdout(said), redirect_stderr(said):
        try:
            if words[0] == "load":
                print(_digest(*words[1:]))
            else:
                code = app(words, standalone_mode=False) or 0
        except BaseException as error:
            code = getattr(error, "exit_code", 1)
            print(f"{type(error).__name__}: {error}")
            traceback.print_exc(file=sys.__stderr__)
    os.write(answer, json.dumps({"code": code, "said": said.getvalue(), "events": events.seen}).encode())
    os._exit(0)


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
    from tests.tiny import specialist, tokenizer
    from ultrafuser.cli import app

    app(["push", "--help"], standalone_mode=False)
    with TemporaryDirectory() as folder:
        UltraFuserForCausalLM.from_specialists({n: specialist(layers=1) for n in "ab"}).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        UltraFuserForCausalLM.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)


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
        pid = os.fork()
        if not pid:
            _run(**json.loads(line), answer=answer)
        os.close(answer)
        print(json.dumps(pid), file=out, flush=True)
        with os.fdopen(answers) as read:
            found = read.read()
        os.waitpid(pid, 0)
        print(found or json.dumps({"code": None}), file=out, flush=True)


if __name__ == "__main__":
    main()
