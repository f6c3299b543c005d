"""A server of ours in a thread of this process, and clients that speak HTTP as they like."""

import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager

from ultrafuser.guarding import server


CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


@contextmanager
def running(app, host="127.0.0.1"):
    """The app behind our uvicorn. Its port."""
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
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
