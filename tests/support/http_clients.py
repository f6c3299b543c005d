"""A server of ours in a thread of this process, and clients that speak HTTP as they like."""

import http.client
import json
import re
import socket
import threading
import time
from contextlib import contextmanager
from uuid import uuid4

from ultrafuser.serve.guard import server


CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def running(app, host="127.0.0.1"):
    """The app behind our uvicorn. Its port."""
    port = free_port()
    served = server(app, host, port)
    thread = threading.Thread(target=served.run, daemon=True)
    thread.start()
    while not served.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield port
    served.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def ask(port, path=COMPLETIONS, body=None, *, method=None, headers=None, timeout=60):
    """Status and what was answered: parsed, where it is JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json"} if data is not None else {}
    connection.request(method or ("GET" if data is None else "POST"), path, data, sent | (headers or {}))
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, json.loads(text) if answer.headers.get_content_type() == "application/json" else text


def message(answer):
    """Of an error."""
    return answer[1]["error"]["message"]


def opened(port, data):
    """A connection on which these bytes have been sent."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(data)
    return connection


def request(body, path=COMPLETIONS, length=None):
    """A request as bytes."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length or len(data)}\r\n\r\n".encode() + data


def until(true, seconds=30):
    """Waits for something to become so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def ended(connection, seconds=20):
    """Whether the server ends a connection, in time."""
    connection.settimeout(seconds)
    try:
        while connection.recv(2**16):
            pass
    except ConnectionResetError:
        pass
    return True


class Visitor:
    """Asks as the page does, by hand."""

    def __init__(self, port):
        self.port, self.session = port, uuid4().hex
        config = ask(port, "/config")[1]
        # of the buttons and fields the one that takes the prompt
        self.say = next(d["id"] for d in config["dependencies"] if len(d["inputs"]) > 3)

    def join(self, prompt="2+2?", most=12, temperature=1.0, bias=(0.0, 0.0, 0.0)):
        data = [prompt, None, most, temperature, *bias]
        body = {
            "data": data,
            "fn_index": self.say,
            "session_hash": self.session,
            "trigger_id": None,
            "event_data": None,
        }
        return ask(self.port, "/gradio_api/queue/join", body)

    def listen(self):
        """What is told until the question is answered, and what the last message says."""
        events = ask(self.port, f"/gradio_api/queue/data?session_hash={self.session}")[1]
        told = [json.loads(line.removeprefix("data: ")) for line in events.splitlines() if line.startswith("data: ")]
        return next(event for event in told if event["msg"] == "process_completed")

    def asks(self, *arguments, **settings):
        assert self.join(*arguments, **settings)[0] == 200
        return self.listen()


def said(event):
    """The answer that a visitor sees, as HTML."""
    return "".join(re.findall(r"<span style[^>]*>([^<]*)</span>", event["output"]["data"][2]))
