"""Asking a model behind any OpenAI-compatible server, many requests at a time."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import openai

from ..keys import api_key, check_address, check_no_secrets, open_client, without_key
from ..replies import NO_COMPLETION, bounded_client, reply_of, text_of


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
        settings = {"max_retries": self.retries, "timeout": self.timeout, "http_client": bounded_client(self.timeout)}
        async with open_client(self.url, self.key(), **settings) as client:

            async def ask(messages: list[dict]) -> tuple[str, str]:
                messages = [{**message, "content": text_of(message["content"])} for message in messages]
                try:
                    completion = await client.chat.completions.create(
                        model=self.model, messages=messages, extra_body=self.options
                    )
                    text, finish = reply_of(completion)
                    return text_of(without_key(text, self.key())), finish or "unknown"
                except openai.BadRequestError as error:
                    raise RefusedError(self._in_words(error)) from error
                except NO_COMPLETION as error:
                    raise BadReplyError(f"{self.url} replied with something that is no chat completion.") from error

            try:
                yield ask
            except openai.NotFoundError as error:
                raise EndpointError(await self._unknown_model(client, error)) from error
            except openai.OpenAIError as error:
                raise EndpointError(self._in_words(error)) from error

    async def _unknown_model(self, client: openai.AsyncOpenAI, error: openai.OpenAIError) -> str:
        try:
            known = [without_key(m, self.key()) for m in sorted([m.id async for m in client.models.list()])]
        except (openai.OpenAIError, *NO_COMPLETION):
            known = []
        there = f"It knows {known[:20]}." if known else "It does not list what it knows; check the address, too."
        return f"{self.url} does not know the model {self.model!r}. {there} It said: {self._said(error)}"

    def _in_words(self, error: openai.OpenAIError) -> str:
        tries = f"{self.retries + 1} tries" if self.retries else "one try"
        match error:
            case openai.APITimeoutError():
                return (
                    f"{self.url} did not answer within {self.timeout:g} s in {tries}. Raise the time-out, or ask for "
                    f"fewer at once ({self.concurrency} now)."
                )
            case openai.APIConnectionError():
                return (
                    f"{self.url} could not be reached in {tries}. Check the address and that the server is up. It "
                    f"ended with: {self._said(error.__cause__ or error)}"
                )
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                return (
                    f"{self.url} refused the API key, which came from {self.variable or 'nowhere: name a variable'}. "
                    f"It said: {self._said(error)}"
                )
            case openai.RateLimitError():
                return (
                    f"{self.url} still refuses after {tries}: too many requests, or nothing left to pay with. Ask "
                    f"for fewer at once ({self.concurrency} now), or wait. It said: {self._said(error)}"
                )
            case openai.APIStatusError() if error.status_code < 500:
                return (
                    f"{self.url} cannot take a request for {self.model!r} with {self.options}. It said: "
                    f"{self._said(error)}"
                )
        return f"{self.url} still fails after {tries}. It said: {self._said(error)}"

    def _said(self, error: BaseException) -> str:
        lines = without_key(str(error), self.key()).splitlines() or [type(error).__name__]
        return f"{lines[0][:300]!r}."


class EndpointError(RuntimeError):
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
