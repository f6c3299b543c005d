"""Asking a model behind any OpenAI-compatible server, many requests at a time."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import openai

from ..keys import api_key, check_address, check_no_secrets, without_key
from ..openai_client import NO_COMPLETION, Server, reply_of, text_of


OPENAI_URL = "https://api.openai.com/v1"


@dataclass
class Endpoint:
    """A model on a server.

    Attributes:
        model: The name under which the server knows it.
        url: Base address, up to and including `/v1`.
        key_variable: Environment variable that holds the API key. None sends no key, except to OpenAI itself, which
            gets the one in OPENAI_API_KEY.
        options: More fields of each request, such as `temperature` or `max_tokens`.
        concurrency: Requests in flight at once.
        retries: Of a request that met a rate limit, a server error, a time-out or no connection, with exponential
            back-off, or after as long as the server asks for.
        timeout: Of one try, in seconds.
    """

    model: str
    url: str = OPENAI_URL
    key_variable: str | None = None
    options: dict = field(default_factory=dict)
    concurrency: int = 8
    retries: int = 6
    timeout: float = 300.0

    def __post_init__(self):
        check_address(self.url)
        check_no_secrets(self.options, "Options of a request")

    def key(self) -> str:
        """The API key.

        Raises:
            EndpointError: If the variable is not set, or its key is not for this server.
        """
        try:
            return api_key(self.url, self.variable, "name the variable that holds it")
        except ValueError as error:
            raise EndpointError(str(error)) from error

    @property
    def variable(self) -> str | None:
        """The environment variable whose key is sent; None sends none."""
        is_openai = urlsplit(self.url).hostname == urlsplit(OPENAI_URL).hostname
        return self.key_variable or ("OPENAI_API_KEY" if is_openai else None)

    @asynccontextmanager
    async def connect(self):
        """Gives `ask`: an async function from chat messages to the answer's text and why it ended.

        Raises:
            EndpointError: If the server cannot be reached, does not know key or model, or still fails after all
                retries, in words.
        """
        server = Server(self.url, self.model, self.options, self.variable, self.key(), self.retries, self.timeout)
        async with server.client() as client:

            async def ask(messages: list[dict]) -> tuple[str, str]:
                messages = [{**message, "content": text_of(message["content"])} for message in messages]
                try:
                    completion = await client.chat.completions.create(
                        model=self.model, messages=messages, extra_body=self.options
                    )
                    text, finish = reply_of(completion)
                    return text_of(without_key(text, server.key)), finish or "unknown"
                except openai.BadRequestError as error:
                    raise RefusedError(self._failure(server, error)) from error
                except NO_COMPLETION as error:
                    raise BadReplyError(f"{self.url} replied with something that is no chat completion.") from error

            try:
                yield ask
            except openai.NotFoundError as error:
                known = await self._known(client, server.key)
                raise EndpointError(self._failure(server, error, known)) from error
            except openai.OpenAIError as error:
                raise EndpointError(self._failure(server, error)) from error

    async def _known(self, client: openai.AsyncOpenAI, key: str) -> list[str]:
        """Names of the server's models; none if it does not list them."""
        try:
            return [without_key(name, key) for name in sorted([model.id async for model in client.models.list()])]
        except (openai.OpenAIError, *NO_COMPLETION):
            return []

    def _failure(self, server: Server, error: Exception, known: list[str] | None = None) -> str:
        fewer = f"ask for fewer at once ({self.concurrency} now)"
        ways_out = {
            "timeout": f"Raise the time-out, or {fewer}.",
            "connection": "Check the address and that the server is up.",
            "key": "" if self.variable else "Name a variable that holds one.",
            "model": f"It knows {known[:20]}." if known else "It does not list what it knows; check the address, too.",
            "rate": f"Wait, or {fewer}.",
        }
        return server.failure(error, ways_out)


class EndpointError(OSError):
    """A server that does not answer, and why, in words."""


class RefusedError(EndpointError):
    """A request that the server refuses for what is in it."""


class BadReplyError(EndpointError):
    """A reply that is no chat completion."""


async def for_all(items: Iterable, work: Callable[..., Awaitable[None]], concurrency: int) -> None:
    """Awaits `work(item)` for all items, at most `concurrency` at once.

    At the first failure nothing new begins, but what is under way is waited for: it may be paid for already.
    """
    queue, failures = iter(items), []

    async def worker() -> None:
        for item in queue:
            if failures:
                return
            try:
                await work(item)
            except Exception as error:
                failures.append(error)

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    if failures:
        raise failures[0]
