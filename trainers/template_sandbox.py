"""Renders templates that others wrote, chat templates and prompts, in a process that can do nothing else.

A template is a program: it may try to run code, to loop for ever or to fill the memory. So it is compiled and rendered
in a sandboxed Jinja, in a child process without an environment, which can open no file and start no process, within
limits on time, memory and length. What it renders is what transformers, or Jinja itself, renders.

This file is also the script that runs there.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading


SECONDS = 10.0  # of one rendering
STARTING_SECONDS = 120.0  # of the process, which imports what it needs
LONGEST = 10_000_000  # characters of what is rendered
MEMORY = 2**30  # bytes of the process's address space


class RenderingError(ValueError):
    """Raised if a template cannot be rendered. The message is the reason, without a full stop.

    Attributes:
        line: The template's line with the syntax error; None for other errors.
    """

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message.rstrip("."))
        self.line = line


def render_chat(
    tokenizer,
    messages: list[dict],
    template: str | None = None,
    *,
    prompt: bool = True,
    tools: list[dict] | None = None,
    variables: dict | None = None,
) -> str:
    """Renders a conversation in a chat template, as `tokenizer.apply_chat_template(..., tokenize=False)` does.

    Args:
        tokenizer: The template may name its special tokens.
        messages: The conversation.
        template: Default: the tokenizer's.
        prompt: End with the beginning of the response (`add_generation_prompt`).
        tools: Descriptions of functions that the response may call.
        variables: Further variables of the template, such as `enable_thinking`.

    Raises:
        RenderingError: If it cannot be rendered within the limits.
    """
    request = {
        "template": tokenizer.get_chat_template(template, tools),
        "messages": [{key: value for key, value in m.items() if value is not None} for m in messages],
        "prompt": prompt,
        "tools": tools,
        "variables": {**tokenizer.special_tokens_map, **(variables or {})},
    }
    return _ask("chat", "render_chat", request)


def render_prompt(template: str, values: dict) -> str:
    """Renders a prompt with its placeholders filled in. Every placeholder must be filled.

    Raises:
        RenderingError: If it cannot be rendered within the limits.
    """
    return _ask("prompt", "render_prompt", {"template": template, "values": values})


def render_task(template: str, values: dict) -> str:
    """Renders a template of lm-eval's tasks for a row, as lm-eval does.

    Raises:
        RenderingError: If it cannot be rendered within the limits.
    """
    return _ask("prompt", "render_task", {"template": template, "values": values})


def placeholders(template: str) -> set[str]:
    """Returns the names that a prompt takes from outside.

    Raises:
        RenderingError: If it is no valid template, or cannot be compiled within the limits.
    """
    return set(_ask("prompt", "placeholders", {"template": template}))


_processes: dict[str, subprocess.Popen] = {}
_lock = threading.Lock()


def _forget() -> None:
    global _lock
    # a forked process shares no pipe with its parent, and no lock that a thread may have held
    _processes.clear()
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _ask(kind: str, task: str, request: dict):
    with _lock:
        process = _processes.get(kind)
        if process is None or process.poll() is not None:
            process = _processes[kind] = _start(kind)
        answer = _exchange(process, {"task": task, **request}, SECONDS)
    if "error" in answer:
        raise RenderingError(answer["error"], answer.get("line"))
    return answer["result"]


def _start(kind: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", os.path.abspath(__file__)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TZ": os.environ.get("TZ", "")},
    )
    started = _exchange(process, {"path": sys.path, "kind": kind, "memory": MEMORY}, STARTING_SECONDS)
    if "error" in started:
        raise RenderingError(started["error"])
    return process


def _exchange(process: subprocess.Popen, request: dict, seconds: float) -> dict:
    """Sends one line and reads one. A process that does not answer in time is killed."""
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, end)
    timer.start()
    line = b""
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
    finally:
        timer.cancel()
        if not line.endswith(b"\n"):
            # interrupted, too: its answer would be taken for the next one's
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
    if late.is_set():
        return {"error": f"it took longer than {seconds:g} s"}
    if not line.endswith(b"\n"):
        return {"error": f"it ended the process that renders it, which may use {MEMORY / 2**30:g} GiB of memory"}
    return json.loads(line)


# ---------------------------------------------------------------------------------- in the process that renders


def _main() -> None:
    lines = iter(sys.stdin.buffer.readline, b"")
    start = json.loads(next(lines))
    sys.path[:] = start["path"]
    try:
        tasks = {"chat": _chat_tasks, "prompt": _prompt_tasks}[start["kind"]]()
    except ImportError as error:
        _reply({"error": f"rendering it needs what cannot be imported: {error}"})
        return
    _limit(start["memory"])
    _reply({"result": "ready"})
    for line in lines:
        request = json.loads(line)
        _reply(_answer(tasks[request.pop("task")], request))


def _reply(answer: dict) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


def _answer(task, request: dict) -> dict:
    try:
        result = task(**request)
    except MemoryError:
        return {"error": "it needs more memory than rendering may use"}
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except Exception as error:  # a template is a program of its own, and can fail in any way
        return {"error": (str(error) or type(error).__name__)[:1000], "line": getattr(error, "lineno", None)}
    if isinstance(result, str) and len(result) > LONGEST:
        return {"error": f"it renders {len(result):,} characters, and {LONGEST:,} are the most"}
    return {"result": result}


def _prompt_tasks() -> dict:
    # some is imported here because Jinja would when it first needs it, and then no file can be opened
    import pprint  # noqa: F401
    import re
    import textwrap  # noqa: F401
    from functools import lru_cache

    import jinja2
    import jinja2.debug
    import jinja2.meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    compiled = lru_cache(64)(environment.from_string)
    # as lm-eval has it
    tasks = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    tasks.filters["regex_replace"] = lambda text, pattern, by, count=0: re.sub(pattern, by, text, count=count)
    compiled_task = lru_cache(64)(tasks.from_string)
    # the codec of its literals, too
    compiled("{{ 'a' }}").render()
    with contextlib.suppress(jinja2.UndefinedError):
        compiled("{{ a.b }}").render()
    return {
        "placeholders": lambda template: sorted(jinja2.meta.find_undeclared_variables(environment.parse(template))),
        "render_prompt": lambda template, values: compiled(template).render(**values),
        "render_task": lambda template, values: compiled_task(template).render(**values),
    }


def _chat_tasks() -> dict:
    from transformers.utils.chat_template_utils import render_jinja_template

    _prompt_tasks()

    def render(template: str, messages: list[dict], prompt: bool, tools: list[dict] | None, variables: dict) -> str:
        rendered, _ = render_jinja_template(
            conversations=[messages], chat_template=template, add_generation_prompt=prompt, tools=tools, **variables
        )
        return rendered[0]

    # as above: the time zone's file
    render("{{ strftime_now('%d %b %Y %Z') }}", [], False, None, {})
    return {"render_chat": render}


def _limit(memory: int) -> None:
    try:
        import resource
    except ImportError:
        # not on Windows
        return
    limits = {resource.RLIMIT_AS: memory, resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    # with no more open files, nothing can be read, written, reached or started
    limits |= {resource.RLIMIT_NOFILE: 0}
    for kind, limit in limits.items():
        # macOS has no limit on the address space
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (limit, limit))


if __name__ == "__main__":
    _main()
