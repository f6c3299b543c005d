"""A server to be judged and to judge, which follows a script, and questions for it."""

import json
import threading
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ultrafuser.evaluation.endpoint import Endpoint


GREETING = "Reply with the word: ready"


ROWS = [
    {"id": "sum", "category": "math", "turns": ["What is 2+2?", "And 3 more?"], "reference": ["4", "7"]},
    {"id": "poem", "category": "writing", "turns": ["Write a poem."], "reference": ["Roses are red."]},
    {"id": 3, "category": "writing", "turns": ["Write a title."], "reference": ["Roses"]},
]


class Server:
    """An OpenAI-compatible server that follows a script.

    `reply(messages)` gives the text of a reply; a number is an HTTP status instead, bytes are a body as it is, and
    None hangs up. Every request is kept.
    """

    def __init__(self, reply=lambda messages: "[[7]]", models=("judge", "served"), key=None):
        self.reply, self.models, self.key, self.requests, self.lock = reply, models, key, [], threading.Lock()
        self.busy = self.most_busy = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def send(self, status, body):
                self.send_response(status)
                for header in {
                    "content-type": "application/json",
                    "content-length": str(len(body)),
                    "retry-after-ms": "1",
                }.items():
                    self.send_header(*header)
                # a client that ran out of patience is gone
                with suppress(BrokenPipeError, ConnectionResetError):
                    self.end_headers()
                    self.wfile.write(body)

            def do_GET(self):
                body = {"object": "list", "data": [{"id": m, "object": "model"} for m in outer.models]}
                self.send(200, json.dumps(body).encode())

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if outer.key and self.headers["authorization"] != f"Bearer {outer.key}":
                    return self.send(401, b'{"error": {"message": "wrong key"}}')
                if request["model"] not in outer.models:
                    return self.send(404, b'{"error": {"message": "no such model"}}')
                with outer.lock:
                    outer.requests.append(request)
                    outer.busy += 1
                    outer.most_busy = max(outer.busy, outer.most_busy)
                said = outer.reply(request["messages"])
                with outer.lock:
                    outer.busy -= 1
                if said is None:
                    return self.close_connection
                if isinstance(said, int):
                    return self.send(said, b'{"error": {"message": "scripted"}}')
                if isinstance(said, bytes):
                    return self.send(200, said)
                message = {"role": "assistant", "content": said}
                body = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
                return self.send(200, json.dumps(body).encode())

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def endpoint(self, model="judge", **settings):
        return Endpoint(model, self.url, **{"retries": 2, "timeout": 5, **settings})

    def asked(self):
        """How often each conversation, but for greetings, was sent."""
        texts = (json.dumps(r["messages"]) for r in self.requests if r["messages"][0]["content"] != GREETING)
        return Counter(texts)

    def close(self):
        self.server.shutdown()
        self.server.server_close()
