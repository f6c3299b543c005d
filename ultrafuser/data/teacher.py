"""Asking the teacher: many requests under way at once, within its limits and the budget, each paid for once."""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import openai

from ..journal import ReplyJournal, tokens
from ..keys import without_key
from ..openai_client import NO_COMPLETION, Server, reply_of
from ..provenance import digest
from .recipe import Budget
from .recipe import Teacher as TeacherSettings


CHARACTERS_PER_TOKEN = 4  # of English prose; to foresee, and where a server does not tell
REFUSALS_IN_A_ROW = 10  # or replies that are none: then it is the server, or how it is asked
SECONDS_BETWEEN_TRIES = 0.5


class Request(NamedTuple):
    """Request to the teacher.

    Attributes:
        step: Name of the step that asks.
        domain: Name of the domain it is for.
        messages: The conversation so far.
        number: Items to list in the reply. None asks for text.
        sample: Which time the same is asked: another number is another request.
        reply_tokens: Typical length of the reply, to foresee cost and pace.
    """

    step: str
    domain: str
    messages: list[dict]
    number: int | None = None
    sample: int = 0
    reply_tokens: int = 100

    def prompt_tokens(self) -> int:
        """Roughly."""
        return sum(len(m["content"]) for m in self.messages) // CHARACTERS_PER_TOKEN + 4 * len(self.messages)


class Reply(NamedTuple):
    """Reply of the teacher, and whether it reached the limit of tokens before its end."""

    text: str
    cut_off: bool = False


class Teacher:
    """A model behind an OpenAI-compatible server, with a journal of all it ever said. Use it as a context manager.

    Attributes:
        stopped: Why nothing more is sent, in words: the budget, or a server that does not serve. None while it does.
        refused: Requests that the server refused for what is in them, in this run or an earlier one.
    """

    def __init__(
        self,
        settings: TeacherSettings,
        journal: ReplyJournal,
        budget: Budget | None = None,
        on_reply: Callable[[Request], None] = lambda request: None,
    ) -> None:
        """Connects to nothing yet.

        Args:
            settings: Where it is and how it may be asked.
            journal: An open journal. A request that it holds is not sent.
            budget: What may be spent, what the journal holds included.
            on_reply: Called when the reply to a request is there.

        Raises:
            ValueError: If the environment lacks the API key.
        """
        self.settings, self.journal, self.budget, self.on_reply = settings, journal, budget or Budget(), on_reply
        self.stopped: str | None = None
        self.refused = self._refusals_in_a_row = 0
        # given up, once another reply has shown that the server is not to blame
        self._unread: list[dict] = []
        self._reserved: list[tuple[int, int]] = []
        self._settled = asyncio.Condition()
        self._requests_pace = Pace(settings.requests_per_minute)
        self._tokens_pace = Pace(settings.tokens_per_minute)
        where = settings.base_url, settings.model, settings.parameters
        self._server = Server(
            *where, settings.api_key_variable, settings.api_key(), settings.retries, settings.timeout
        )
        self._client = self._server.client()
        self._loop = asyncio.new_event_loop()

    def ask(self, requests: list[Request]) -> list[Reply | None]:
        """Replies in the order of the requests, whatever order they arrived in.

        Returns:
            For each request its reply, or None: refused by the server, or not sent because the teacher `stopped`.
        """
        keys = [self._key(request) for request in requests]
        # twice the same request is one request
        missing = {key: r for key, r in zip(keys, requests, strict=True) if key not in self.journal}
        for key, request in zip(keys, requests, strict=True):
            if key not in missing:
                self.on_reply(request)
        self._loop.run_until_complete(self._send_all(missing))
        return [self._reply(key) for key in keys]

    def _reply(self, key: str) -> Reply | None:
        if key not in self.journal:
            return None
        entry = self.journal.get(key)
        if entry["reply"] is None:
            self.refused += 1
            return None
        return Reply(entry["reply"], entry["finish"] == "length")

    def _key(self, request: Request) -> str:
        return digest([self.settings.model, request.messages, self._parameters(request), request.sample], 32)

    def _parameters(self, request: Request) -> dict:
        settings = self.settings
        parameters = {"temperature": settings.temperature}
        if settings.max_tokens is not None:
            parameters["max_tokens"] = settings.max_tokens
        if request.number is not None and settings.structured == "json_object":
            parameters["response_format"] = {"type": "json_object"}
        if request.number is not None and settings.structured == "json_schema":
            schema = {"name": "items", "strict": True, "schema": list_schema(request.number)}
            parameters["response_format"] = {"type": "json_schema", "json_schema": schema}
        return {**parameters, **settings.parameters}

    async def _send_all(self, missing: dict[str, Request]) -> None:
        queue = iter(missing.items())

        async def worker() -> None:
            for key, request in queue:
                dearest = request.prompt_tokens(), self.settings.max_tokens or request.reply_tokens
                if not await self._reserve(dearest):
                    return
                try:
                    await self._send(key, request)
                finally:
                    await self._release(dearest)

        await asyncio.gather(*(worker() for _ in range(min(self.settings.concurrency, len(missing)))))

    async def _send(self, key: str, request: Request) -> None:
        await self._requests_pace.wait(1)
        foreseen = request.prompt_tokens() + request.reply_tokens
        await self._tokens_pace.wait(foreseen)
        if self.stopped:
            return
        entry = {"key": key, "step": request.step, "domain": request.domain}
        try:
            entry |= await self._complete(request)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            self._refusals_in_a_row += 1
            # a server that never accepted anything refuses how it is asked, not what
            if len(self.journal) == 0 or self._refusals_in_a_row >= REFUSALS_IN_A_ROW:
                self.stopped = self._failure(error)
                return
            entry |= {"reply": None, "finish": self._server.quoted(error), "tokens_in": 0, "tokens_out": 0}
        except _UnreadableError as error:
            self._unread.append(entry | {"reply": None, "finish": str(error), "tokens_in": 0, "tokens_out": 0})
            if len(self._unread) >= REFUSALS_IN_A_ROW:
                self._unread.clear()
                self.stopped = self.stopped or self._failure(error)
            return
        except openai.OpenAIError as error:
            self.stopped = self.stopped or self._failure(error)
            return
        else:
            self._refusals_in_a_row = 0
            while self._unread:
                self.journal.write(self._unread.pop())
        self._tokens_pace.correct(entry["tokens_in"] + entry["tokens_out"] - foreseen)
        self.journal.write(entry)
        self.on_reply(request)

    async def _complete(self, request: Request) -> dict:
        """The reply and its usage. What is no completion at all is asked for again, as a lost connection is.

        Raises:
            _UnreadableError: If it never was one.
        """
        for tries_left in range(self.settings.retries, -1, -1):
            try:
                completion = await self._client.chat.completions.create(
                    model=self.settings.model, messages=request.messages, extra_body=self._parameters(request)
                )
                return self._content(completion, request)
            except NO_COMPLETION as error:
                if not tries_left:
                    raise _UnreadableError(
                        f"what came is no chat completion ({self._server.quoted(error)})"
                    ) from error
                await asyncio.sleep(SECONDS_BETWEEN_TRIES)

    async def _reserve(self, dearest: tuple[int, int]) -> bool:
        """Waits until the budget holds the dearest reply. False, and `stopped`, if it never will."""
        async with self._settled:
            while not self.stopped and (over := self._over_budget(dearest)):
                if not self._reserved:
                    self.stopped = over
                else:
                    await self._settled.wait()
            if not self.stopped:
                self._reserved.append(dearest)
        return not self.stopped

    async def _release(self, dearest: tuple[int, int]) -> None:
        async with self._settled:
            self._reserved.remove(dearest)
            self._settled.notify_all()

    def _over_budget(self, dearest: tuple[int, int]) -> str | None:
        tokens_in, tokens_out = map(sum, zip(self.spent, dearest, *self._reserved, strict=True))
        limits = {
            "tokens": (self.budget.tokens, tokens_in + tokens_out, sum(self.spent)),
            "money": (self.budget.money, cost(self.settings, tokens_in, tokens_out), cost(self.settings, *self.spent)),
        }
        for name, (limit, foreseen, spent) in limits.items():
            if limit is not None and foreseen > limit:
                return (
                    f"The budget allows {limit:,} ({name}); {spent:,.10g} are spent and the next request could go "
                    f"beyond. Raise `budget.{name}` and run again: nothing is paid for twice."
                )
        return None

    @property
    def spent(self) -> tuple[int, int]:
        """Tokens of prompts and of replies, all runs together."""
        return self.journal.tokens_in, self.journal.tokens_out

    def _failure(self, error: Exception) -> str:
        """Why the server does not serve, and the way out."""
        now = f"(now {self.settings.concurrency})"
        ways_out = {
            "timeout": f"Raise `teacher.timeout`, or lower `teacher.concurrency` {now}.",
            "connection": "See that the server is up and `teacher.base_url` right.",
            "key": "It is named in `teacher.api_key_variable`.",
            "model": f"Name a model that {self.settings.base_url}/models lists, or correct `teacher.base_url`.",
            "rate": f"Lower `teacher.requests_per_minute` or `teacher.concurrency` {now}.",
            "request": "A server that knows no schemas needs `teacher.structured: none`.",
        }
        return f"{self._server.failure(error, ways_out)} Then run again: all replies so far are kept."

    def _content(self, completion, request: Request) -> dict:
        """Returns the part of a completion that the journal keeps."""
        (text, finish), usage = reply_of(completion), getattr(completion, "usage", None)
        text = without_key(text, self._server.key)
        sent, received = (tokens(getattr(usage, f"{part}_tokens", None)) for part in ("prompt", "completion"))
        return {
            "reply": text,
            "finish": finish,
            "tokens_in": request.prompt_tokens() if sent is None else sent,
            "tokens_out": len(text) // CHARACTERS_PER_TOKEN if received is None else received,
        }

    async def _close(self) -> None:
        # after Ctrl-C, requests may be under way
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

    def __enter__(self) -> "Teacher":
        return self

    def __exit__(self, *_) -> None:
        self._loop.run_until_complete(self._close())
        self._loop.close()


class _UnreadableError(openai.OpenAIError):
    """Raised if no try returned a usable reply."""


class Pace:
    """Lets so much through per minute, evenly."""

    def __init__(self, per_minute: float | None) -> None:
        self.seconds_each = 60 / per_minute if per_minute else 0.0
        self.free_at = 0.0

    async def wait(self, amount: float) -> None:
        """Returns when it is this amount's turn."""
        now = asyncio.get_running_loop().time()
        turn = max(now, self.free_at)
        self.free_at = turn + amount * self.seconds_each
        if turn > now:
            await asyncio.sleep(turn - now)

    def correct(self, more: float) -> None:
        """Accounts for an amount that was foreseen wrongly by `more`."""
        self.free_at += more * self.seconds_each


def list_schema(number: int) -> dict:
    """The JSON schema of an object that lists `number` strings as its `items`."""
    items = {"type": "array", "items": {"type": "string"}, "minItems": number, "maxItems": number}
    return {"type": "object", "properties": {"items": items}, "required": ["items"], "additionalProperties": False}


def cost(settings: TeacherSettings, tokens_in: int, tokens_out: int) -> float:
    """Returns the price of these tokens, in the unit of the prices."""
    return (tokens_in * settings.price_in + tokens_out * settings.price_out) / 1e6
