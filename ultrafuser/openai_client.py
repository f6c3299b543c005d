"""A client of OpenAI-compatible servers: bounded replies, which may be anything, and failures as sentences."""

import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import ModuleType

import openai

from .keys import hidden_from, without_key


LONGEST_BODY = 16_000_000  # bytes of a reply with all that is around it
LONGEST_TEXT = 100_000  # characters of it that are kept; longer ones count as cut off


class ReplyTooLongError(Exception):
    """A server that sends more than any model says."""


# what reading something else than a chat completion raises: no JSON, other types, brackets or numbers without end
NO_COMPLETION = (ReplyTooLongError, ValueError, AttributeError, TypeError, LookupError, RecursionError)


def bounded_client(seconds: float):
    """A client for `openai.AsyncOpenAI` that gives up on a reply that would not end before the memory, or the time, does."""

    async def bound(response) -> None:
        # a small body may hold a large one: none is unpacked
        response.headers.pop("content-encoding", None)
        # which of two HTTP libraries it is depends on openai's version
        library = sys.modules[type(response).__module__.partition(".")[0]]
        response.stream = _bounded(library, response.stream, seconds)

    client = openai.DefaultAsyncHttpxClient(headers={"Accept-Encoding": "identity"})
    client.event_hooks["response"].append(bound)
    return client


def _bounded(library: ModuleType, stream, seconds: float):
    class Bounded(library.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            size, began = 0, time.monotonic()
            async for part in stream:
                size += len(part)
                if size > LONGEST_BODY:
                    raise ReplyTooLongError(f"A reply has {LONGEST_BODY:,} bytes at most, but one was longer.")
                if time.monotonic() - began > seconds:
                    raise library.ReadTimeout(f"A reply had not ended after {seconds:g} s.")
                yield part

        async def aclose(self) -> None:
            await stream.aclose()

    return Bounded()


def reply_of(completion) -> tuple[str, str | None]:
    """The text of a chat completion, and why it ended.

    Raises:
        NO_COMPLETION: If it is something else.
    """
    choice = completion.choices[0]
    text, finish = choice.message.content, choice.finish_reason
    if not isinstance(text, str | None):
        raise TypeError(f"the content is of type {type(text).__name__}")
    text = text or ""
    if len(text) > LONGEST_TEXT:
        return text[:LONGEST_TEXT], "length"
    return text, finish if isinstance(finish, str) else None


def text_of(text: str) -> str:
    """The text with nothing in it that UTF-8 cannot hold: half a surrogate pair."""
    return text.encode("utf-8", "replace").decode()


@dataclass(frozen=True)
class Server:
    """Settings of requests to a server.

    Attributes:
        url: Base address, up to and including `/v1`.
        model: The name under which it knows the model.
        options: More fields of each request.
        variable: Environment variable that `key` came from.
        key: API key; "none" is no one's.
        retries: Times a failed request is sent again, after as long as Retry-After says or twice as long each time.
        timeout: Of one try, in seconds.
    """

    url: str
    model: str
    options: dict
    variable: str | None
    key: str
    retries: int
    timeout: float

    def client(self) -> openai.AsyncOpenAI:
        """Returns a client, which has connected to nothing yet. It sends nothing of the environment but the key."""
        limits = {"max_retries": self.retries, "timeout": self.timeout, "http_client": bounded_client(self.timeout)}
        with hidden_from(self.url):
            return openai.AsyncOpenAI(base_url=self.url, api_key=self.key, **limits)

    def quoted(self, error: BaseException) -> str:
        """Returns the message of an error, shortened and without the key, which the server may have sent back."""
        return without_key(" ".join(str(error).split()) or type(error).__name__, self.key)[:300]

    def failure(self, error: Exception, ways_out: Mapping[str, str]) -> str:
        """Returns why the server does not serve, and the way out.

        Args:
            error: From the client.
            ways_out: By the kind of failure, a key of `FAILURES`.
        """
        kind, fact = next((kind, fact) for kind, (types, fact) in FAILURES.items() if isinstance(error, types))
        fact = fact.format(
            url=self.url,
            model=self.model,
            options=self.options,
            variable=self.variable or "nowhere",
            timeout=f"{self.timeout:g}",
            tries=f"{self.retries + 1} tries" if self.retries else "one try",
        )
        cause = error.__cause__ if kind == "connection" and error.__cause__ else error
        last = "It ended with" if kind in ("timeout", "connection") else "It said"
        return " ".join(filter(None, (fact, ways_out.get(kind), f"{last}: {self.quoted(cause).rstrip('.')}.")))


# kind of failure to the client's errors of that kind, and what it says; the first that fits holds
FAILURES = {
    "timeout": (openai.APITimeoutError, "{url} did not answer within {timeout} s in {tries}."),
    "connection": (openai.APIConnectionError, "{url} could not be reached in {tries}."),
    "key": (
        (openai.AuthenticationError, openai.PermissionDeniedError),
        "{url} refused the API key, which came from {variable}.",
    ),
    "model": (openai.NotFoundError, "{url} does not know the model {model!r}."),
    "rate": (openai.RateLimitError, "{url} still refuses after {tries}: too many requests, or no credit left."),
    "server": (openai.InternalServerError, "{url} still fails after {tries}."),
    "request": (openai.APIStatusError, "{url} cannot take a request for {model!r} with {options}."),
    "other": (Exception, "{url} still fails after {tries}."),
}
