"""A scripted server that speaks OpenAI's protocol: sensible text, always the same for the same request, and faults.

    with TeacherServer(faults={3: "429"}) as server:
        ...  # ask server.url

What goes wrong with real servers is in `FAULTS`.
"""

import asyncio
import hashlib
import json
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import anyio
import yaml

from ultrafuser.data import teacher


KEY, MODEL = "right-key", "scripted"
TINY = yaml.safe_load((Path(__file__).parents[2] / "examples/recipes/ultrachat_tiny.yaml").read_text())
FAULTS = {
    "429": (429, "Rate limit reached"),
    "500": (500, "The server had an error"),
    "400": (400, "The prompt was flagged"),
    "disconnect": None,
    "half a body": None,
    "no JSON": None,
    "no list": None,
    "empty": None,
    "cut off": None,
}
SUBJECTS = [
    "rivers",
    "bridges",
    "budgets",
    "recursion",
    "fractions",
    "gardens",
    "sorting",
    "triangles",
    "letters",
    "databases",
    "markets",
    "vaccines",
]
TASKS = [
    "Explain",
    "Compare",
    "Summarise",
    "Plan",
    "Criticise",
    "Illustrate",
    "Improve",
    "Teach",
    "Estimate",
    "Describe",
]
READERS = [
    "a beginner",
    "an engineer",
    "a committee",
    "my students",
    "a child",
    "a customer",
    "two colleagues",
    "a journalist",
]


class TeacherServer:
    """On a free port of this machine, in a thread.

    Attributes:
        url: Address for `teacher.base_url`.
        bodies: Every request that arrived, in order.
        answered: Those that got a whole reply.
    """

    def __init__(self, *, faults=None, delay=0.0, key=None):
        """Gives `faults`, by the number of the request, counted from 0; or `(every, fault)`."""
        self.faults, self.delay, self.key = faults or {}, delay, key
        self.bodies, self.answered, self.most_at_once = [], [], 0
        self._lock, self._at_once = threading.Lock(), 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                server._handle(self)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def counts(self):
        """How often each distinct request arrived."""
        return Counter(json.dumps(body, sort_keys=True) for body in self.bodies)

    def _handle(self, http):
        body = json.loads(http.rfile.read(int(http.headers["Content-Length"])))
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            time.sleep(self.delay)
            self._reply(http, body, self._fault(number))
        except OSError:
            pass  # whoever asked is gone
        finally:
            with self._lock:
                self._at_once -= 1

    def _fault(self, number):
        if isinstance(self.faults, tuple):
            every, fault = self.faults
            return fault if number % every == every - 1 else None
        return self.faults.get(number)

    def _reply(self, http, body, fault):
        if self.key and http.headers["Authorization"] != f"Bearer {self.key}":
            return _send(http, 401, _error("Incorrect API key provided"))
        if body["model"] != MODEL:
            return _send(http, 404, _error(f"The model {body['model']} does not exist"))
        if fault and FAULTS[fault]:
            status, words = FAULTS[fault]
            return _send(http, status, _error(words), {"Retry-After": "0.05"} if status == 429 else {})
        if fault == "disconnect":
            http.close_connection = True
            return http.connection.shutdown(2)
        text = {"no list": "I cannot think of any.", "empty": ""}.get(fault) or ("" if fault == "empty" else say(body))
        whole = json.dumps(completion(body, text, "length" if fault == "cut off" else "stop")).encode()
        if fault == "no JSON":
            return _send(http, 200, b"<html>busy</html>" + whole[:20])
        if fault == "half a body":
            http.close_connection = True
            return _send(http, 200, whole, cut=len(whole) // 2)
        _send(http, 200, whole)
        with self._lock:
            self.answered.append(body)
        return None


def _error(words):
    return json.dumps({"error": {"message": words, "type": "invalid_request_error", "code": None}}).encode()


def _send(http, status, body, headers=None, cut=None):
    http.send_response(status)
    for name, value in {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **(headers or {}),
    }.items():
        http.send_header(name, value)
    http.end_headers()
    http.wfile.write(body[:cut])


def completion(body, text, finish="stop"):
    """A chat completion as OpenAI's API has it."""
    usage = {
        "prompt_tokens": sum(len(m["content"]) // 4 for m in body["messages"]),
        "completion_tokens": len(text) // 4,
    }
    usage["total_tokens"] = sum(usage.values())
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": MODEL, "choices": [choice], "usage": usage}


def say(body):
    """A list if the request has a schema for one, an instruction if only that is asked for, otherwise an answer."""
    rng = random.Random(hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest())
    if "response_format" in body:
        number = body["response_format"]["json_schema"]["schema"]["properties"]["items"]["minItems"]
        return json.dumps({"items": [_item(rng) for _ in range(number)]})
    if "only." in body["messages"][-1]["content"][-40:]:
        return _item(rng)
    a, b = rng.randint(11, 99), rng.randint(11, 99)
    return (
        f"Start with what {rng.choice(SUBJECTS)} have in common. For {rng.choice(READERS)} a number helps: "
        f"{a} * {b} = {a * b}. In Python:\n\n```python\nprint({a} * {b})\n```\n\nSo the answer is {a * b}."
    )


def _item(rng):
    return (
        f"{rng.choice(TASKS)} {rng.choice(SUBJECTS)} and {rng.choice(SUBJECTS)} for {rng.choice(READERS)}, "
        f"in {rng.randint(20, 400)} words, given {rng.randint(2, 99)} * {rng.randint(2, 99)}."
    )


def write_recipe(folder, url="http://127.0.0.1:9/v1", **changes):
    """The tiny recipe, with another server and more changes: `text__turns=3` is `domains.text.turns`."""
    content = json.loads(json.dumps(TINY))
    content["teacher"] |= {"base_url": url, "model": MODEL, "timeout": 10, "retries": 4}
    for place, value in changes.items():
        *path, last = place.split("__")
        part = content["domains"] if path and path[0] in content["domains"] else content
        for name in path:
            part = part[name]
        part[last] = value
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "recipe.yaml"


def try_again_at_once(monkeypatch):
    """Neither the client nor we wait before another try."""

    async def sleep(seconds):
        await asyncio.sleep(0)

    monkeypatch.setattr(anyio, "sleep", sleep)
    monkeypatch.setattr(teacher, "SECONDS_BETWEEN_TRIES", 0)
