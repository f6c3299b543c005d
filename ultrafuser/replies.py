"""What servers of models send back, which may be anything, of any size."""

import sys
import time
from collections.abc import AsyncIterator
from types import ModuleType

import openai


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
