"""Guards `serve` and `demo`: known hosts and origins, a key, little data, in little time."""

import asyncio
import base64
import binascii
import hmac
import os
import socket
from collections.abc import Collection, Iterable
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

import anyio
import uvicorn
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..keys import address_of, is_loopback


LOOPBACK = ("localhost", "127.0.0.1", "::1")
# of a client: for a request's head, for its body, and while it reads nothing of an answer
HEAD_SECONDS, BODY_SECONDS, STALL_SECONDS = 10.0, 30.0, 30.0
MOST_CONNECTIONS = 512
LEAST_BYTES = 2**20  # that a body may have


def refusal(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error in the form of OpenAI's."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message[:2000], "type": kind, "param": None, "code": status}
    return JSONResponse({"error": error}, status, headers)


def key_for(host: str, variable: str, without_key: bool) -> str | None:
    """The key that requests must bring, from the environment; None if they need none.

    Raises:
        ValueError: If others could reach the address and there is no key.
    """
    key = os.environ.get(variable) or None
    if key is None and not without_key and not is_loopback(host):
        raise ValueError(
            f"Whoever reaches {host!r} could use the model, but the environment variable {variable} holds no key. Set it, "
            f"and clients send it (`Authorization: Bearer KEY`; browsers ask for it as a password); or listen on "
            f"127.0.0.1; or add --without-key."
        )
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ValueError(f"A key travels in a header, so it is printable ASCII, but that in {variable} is not.")
    return key


def host_names(host: str, allowed: Iterable[str] = ()) -> set[str]:
    """Names under which a server that listens on `host` may be asked for; "*" stands for every address in numbers."""
    names = {*LOOPBACK, *(name.lower().strip("[]") for name in allowed)}
    return names | ({"*"} if host in ("0.0.0.0", "::", "") else {host.lower().strip("[]")})


class Access(NamedTuple):
    """Who may ask a server.

    Attributes:
        hosts: Names under which it may be asked for, from `host_names`.
        origins: Of web pages elsewhere that may ask, as browsers send them: `https://example.org`.
        key: That requests must bring; a browser as a password.
    """

    hosts: Collection[str]
    origins: Collection[str] = ()
    key: str | None = None


class Guard:
    """Answers what no client of this server should send, and passes the rest on with its body read.

    A web page anywhere can make a browser send requests to this machine. Its own name for the machine (a `Host` that
    was rebound to 127.0.0.1) or its `Origin` gives it away.

    Args:
        app: Behind it.
        access: Who may ask.
        most_bytes: Of a body.
        open_paths: Which need no key.
    """

    def __init__(self, app: ASGIApp, access: Access, *, most_bytes: int, open_paths: Collection[str] = ()):
        self.app, self.hosts, self.key = app, access.hosts, access.key
        self.origins = {origin.lower().rstrip("/") for origin in access.origins}
        self.most_bytes, self.open_paths = most_bytes, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        refused = self._stranger(headers) or self._keyless(scope["path"], headers)
        if refused is not None:
            return await refused(scope, receive, send)
        length = headers.get("content-length", "")
        try:
            if length.isdigit() and int(length) > self.most_bytes:
                raise _TooLargeError
            with anyio.fail_after(BODY_SECONDS):
                body = await self._body(receive)
        except _TooLargeError:
            sent = f"{int(length):,}" if length.isdigit() else "more"
            words = f"A request may have {self.most_bytes:,} bytes, but this one has {sent}. Shorten it."
            return await _refuse_while_it_comes(refusal(413, words, {"Connection": "close"}), receive, send)
        except TimeoutError:
            words = f"The request's body was not here after {BODY_SECONDS:.0f} seconds. Send it faster, or less."
            return await refusal(408, words, {"Connection": "close"})(scope, receive, send)
        if body is None:
            return None
        return await self.app(scope, replayed(body, receive), send)

    def _stranger(self, headers: Headers) -> JSONResponse | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        name = _parsed(f"//{host}").hostname
        if name not in self.hosts and not ("*" in self.hosts and address_of(name or "")):
            names = sorted(self.hosts - {"*"})
            return refusal(400, f"This server is asked for as one of {names}, but the request names {host[:100]!r}.")
        same = origin is None or _parsed(origin).netloc.lower() == host.lower()
        if not same and origin.lower() not in self.origins:
            return refusal(403, f"Only pages of this server may ask it, but this one is of {origin[:100]!r}.")
        return None

    def _keyless(self, path: str, headers: Headers) -> JSONResponse | None:
        if self.key is None or path in self.open_paths:
            return None
        scheme, _, sent = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":
            try:
                sent = base64.b64decode(sent, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                sent = ""
        if hmac.compare_digest(sent.encode(), self.key.encode()):
            return None
        ask = {"WWW-Authenticate": 'Basic realm="UltraFuser", charset="UTF-8"'}
        return refusal(401, "A key is needed, and the request has another or none: `Authorization: Bearer KEY`.", ask)

    async def _body(self, receive: Receive) -> bytes | None:
        """All of it; None if the client has gone."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self.most_bytes:
                raise _TooLargeError
            if not message.get("more_body"):
                return bytes(body)


class _TooLargeError(Exception):
    pass


def replayed(body: bytes, receive: Receive) -> Receive:
    """A body that has been read, to be read again, and then what else comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def _refuse_while_it_comes(refused: JSONResponse, receive: Receive, send: Send) -> None:
    """Answers at once, and lets go only when the client has sent all or a while has passed: most read no earlier."""
    await send({"type": "http.response.start", "status": refused.status_code, "headers": refused.raw_headers})
    await send({"type": "http.response.body", "body": refused.body, "more_body": True})
    with anyio.move_on_after(BODY_SECONDS):
        while (message := await receive())["type"] == "http.request" and message.get("more_body"):
            pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class Impatient(H11Protocol):
    """uvicorn's protocol, which ends connections that send no request, or read no answer, for long."""

    _waiting = _stalled = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
        else:
            self._waiting = self.loop.call_later(HEAD_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._waiting = _cancelled(self._waiting)
        elif self._waiting is None:
            # the first bytes of a further request
            self._waiting = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled = _cancelled(self._stalled)

    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting, self._stalled = _cancelled(self._waiting), _cancelled(self._stalled)
        super().connection_lost(exc)


def server(app: ASGIApp, host: str, port: int) -> uvicorn.Server:
    """One for an app behind a `Guard`, to be run."""
    settings = {"http": Impatient, "ws": "none", "timeout_graceful_shutdown": 5}
    # whoever asks is whom the socket names, and what serves is nobody's business
    settings |= {"proxy_headers": False, "server_header": False}
    return uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning", **settings))


def check_free(host: str, port: int) -> None:
    """Rejects an address that cannot be listened on, before a model is loaded.

    Raises:
        OSError: If it is taken, or is none of this machine.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        raise OSError(
            f"Nothing can listen on port {port} of {host!r}: {error}. Choose another with --port or --host."
        ) from error


def run(app: ASGIApp, host: str, port: int) -> None:
    """Serves an app behind a `Guard` until it is stopped.

    Raises:
        OSError: If the address cannot be listened on.
    """
    try:
        server(app, host, port).run()
    except SystemExit as error:
        # uvicorn has said why
        raise OSError(f"Nothing can listen on port {port} of {host!r}. Choose another with --port.") from error


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def _parsed(address: str) -> SplitResult:
    """The parts of an address, all of them empty if it has none."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")
