"""One fused model behind the handlers of transformers' OpenAI-compatible server.

The handlers know OpenAI's protocol. What they are given is ours: one model that nothing unloads, requests whose fields
have been checked, prompts that have been read and fit, and threads in which requests are answered at once. What is
used of `transformers.cli.serving` is listed in `test_serve.py`.
"""

import asyncio
import inspect
import math
import re
import secrets
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import ContextVar, copy_context
from typing import Annotated, Any, NamedTuple

import anyio
import fastapi  # noqa: F401  without which the handlers are imported, and fail later
import torch
from openai.types import Model
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from transformers import (
    BatchEncoding,
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    BaseHandler,
    CBGenerateManager,
    CBWorkerDeadError,
    GenerateManager,
    GenerationState,
    Modality,
)
from transformers.utils import logging

from modeling_ultrafuser import UltraFuserForCausalLM
from trainers.template_sandbox import RenderingError, render_chat

from ..fused_folders import open_fused
from .guard import LEAST_BYTES, Guard, refusal, run


AT_ONCE, WAITING = 8, 256  # requests that are answered, and that wait for their turn
BYTES_PER_TOKEN = 16  # of a body: what the longest prompt may take, escaped
_TOKEN = re.compile(r"0|[1-9][0-9]{0,18}")
DEFAULT_TOKENS = 1024  # of an answer, as transformers' server has it


# ------------------------------------------------------------------------------------------------ fields of requests


def _no_low_temperature(value: float) -> float:
    if 0 < value < 0.01:
        raise ValueError("below 0.01 numbers overflow; 0 is greedy")
    return value


def _no_template(variables: dict) -> dict:
    taken = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() & variables.keys()
    if taken:
        raise ValueError(
            f"{sorted(taken)} are the server's to choose; only what the model's own template knows may be set"
        )
    return variables


Tokens = Annotated[int, Field(ge=1)]
Short = Annotated[str, Field(min_length=1, max_length=100)]
Variable = bool | int | float | Annotated[str, Field(max_length=100)] | None


def template_variables(written: str | None) -> dict:
    """Variables of the chat template from a command line.

    Raises:
        ValueError: If they are not JSON, or not what a request may set.
    """
    try:
        return TypeAdapter(Annotated[dict[str, Any], AfterValidator(_no_template)]).validate_json(written or "{}")
    except ValidationError as error:
        raise ValueError(
            f'Variables of the chat template are JSON, {{"name": value}}, but got {written[:200]!r}: '
            f"{error.errors()[0]['msg']}. Correct it."
        ) from error


class _Fields(BaseModel):
    """What all kinds of requests have in common. What is not named here has no effect, or is refused by the handler."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100), AfterValidator(_no_low_temperature)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    # repeated tokens are divided by 1 + this
    frequency_penalty: Annotated[float, Field(gt=-1, le=2)] | None = None
    stop: Short | Annotated[list[Short], Field(min_length=1, max_length=4)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=300)] | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    max_output_tokens: Tokens | None = None
    chat_template_kwargs: Annotated[dict[str, Variable], AfterValidator(_no_template)] | None = None
    tools: list[dict[str, Any]] | None = None
    # it would choose decoding for the whole server, code from elsewhere included
    generation_config: None = None


class _Part(BaseModel):
    type: Annotated[str, Field(pattern="^(text|input_text|output_text)$")]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Short
    content: str | list[_Part] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class _Chat(_Fields):
    messages: Annotated[list[_Message], Field(min_length=1)]


class _Completion(_Fields):
    prompt: Annotated[str, Field(min_length=1)]
    suffix: str | None = None


class _Response(_Fields):
    input: Annotated[str, Field(min_length=1)] | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None


class Kind(NamedTuple):
    """Of requests: their fields, what answers them, and the field of the answer's length."""

    fields: type[_Fields]
    handler: type[BaseHandler]
    length: str


KINDS = {
    "/v1/chat/completions": Kind(_Chat, ChatCompletionHandler, "max_tokens"),
    "/v1/completions": Kind(_Completion, CompletionHandler, "max_tokens"),
    "/v1/responses": Kind(_Response, ResponseHandler, "max_output_tokens"),
}
# which continuous batching has once for all requests
SHARED = ("temperature", "top_p", "seed", "frequency_penalty", "stop", "logit_bias")


# ----------------------------------------------------------------------------------------- what handlers are given


class Asked:
    """A request that is being answered.

    Attributes:
        ids: Of its prompt.
        seed: Of its random numbers.
        over: Set when nobody waits for the answer any more.
    """

    def __init__(self):
        self.ids: list[int] = []
        self.seed = 0
        self.over = threading.Event()


_ASKED: ContextVar[Asked | None] = ContextVar("asked", default=None)


class AbandonedError(Exception):
    """Nobody waits for this answer."""


class FailedError(RuntimeError):
    """The model failed: not the request's fault."""


class OneModel:
    """In place of transformers' manager of models, which loads whatever is asked for."""

    def __init__(self, name: str, model: "ServedModel", tokenizer: "ServedTokenizer"):
        self.force_model, self.model, self.tokenizer = name, model, tokenizer

    def process_model_name(self, name: str) -> str:
        """As it is: there is one revision."""
        return name

    def load_model_and_processor(self, name: str, gguf_file: str | None = None):
        """The model and its tokenizer, whatever the name: the handler has refused all but one."""
        return self.model, self.tokenizer

    def get_model_modality(self, model, processor=None) -> Modality:
        """Text."""
        return Modality.LLM


class ServedTokenizer:
    """A tokenizer that reads nothing anew: the prompt of the request in hand has been read already."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer_itself = tokenizer

    def __getattr__(self, name: str):
        return getattr(self.tokenizer_itself, name)

    def __call__(self, *_, return_tensors: str | None = None, **__) -> BatchEncoding:
        """The prompt."""
        ids = _ASKED.get().ids
        # continuous batching takes one flat list
        read = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if return_tensors is None:
            return BatchEncoding(read)
        return BatchEncoding({key: [value] for key, value in read.items()}, tensor_type=return_tensors)

    apply_chat_template = __call__


class ServedModel:
    """A model that generates for several requests at once, each with random numbers of its own, until it is over.

    Where layers are run, it is looked whether anybody still waits: a long prompt is not read to its end for nobody.
    """

    def __init__(self, model: UltraFuserForCausalLM, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer, self.turn = model, tokenizer, threading.Lock()
        for module in model.model.specialists.modules():
            if isinstance(module, torch.nn.ModuleList):
                for layer in module:
                    layer.register_forward_pre_hook(_go_on)

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def generate(self, **settings):
        """As the model does.

        Raises:
            AbandonedError: If the request is over.
            FailedError: If the model fails.
        """
        asked = _ASKED.get()
        settings["tokenizer"] = self.tokenizer
        own = _OwnNumbers(self.turn, asked.seed, self.model.device)
        if settings["generation_config"].do_sample:
            settings |= {"logits_processor": [own.before], "stopping_criteria": [own.after]}
        try:
            _go_on()
            return self.model.generate(**settings)
        except AbandonedError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if asked.over.is_set():
                raise AbandonedError from error
            raise FailedError(f"The model failed: {type(error).__name__}.") from error
        finally:
            own.release()


def _go_on(*_) -> None:
    asked = _ASKED.get()
    if asked is not None and asked.over.is_set():
        raise AbandonedError


class _OwnNumbers:
    """Puts a request's random state in place while its next token is drawn: torch has one for all threads."""

    def __init__(self, turn: threading.Lock, seed: int, device: torch.device):
        self.turn, self.held = turn, False
        self.random = torch.random if device.type == "cpu" else torch.get_device_module(device)
        self.state = torch.Generator(device).manual_seed(seed).get_state()
        owner = self

        class Before(LogitsProcessor):
            def __call__(self, input_ids, scores):
                # where a draft is checked, several times before a token is drawn
                if not owner.held:
                    owner.turn.acquire()
                    owner.held = True
                    owner.random.set_rng_state(owner.state)
                return scores

        class After(StoppingCriteria):
            def __call__(self, input_ids, scores, **_):
                owner.state = owner.random.get_rng_state()
                owner.release()
                return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

        self.before, self.after = Before(), After()

    def release(self) -> None:
        """Lets others draw."""
        if self.held:
            self.held = False
            self.turn.release()


class Threads(GenerateManager):
    """Answers several requests at once, each in a thread: a long one does not hold the others up."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="answering")

    def submit(self, fn: Callable, *args, **kwargs):
        """Runs a function for the request in hand, when its turn comes."""
        return self.pool.submit(copy_context().run, fn, *args, **kwargs)

    def async_submit(self, fn: Callable, *args, **kwargs) -> asyncio.Future:
        """Likewise, to be awaited."""
        return asyncio.wrap_future(self.submit(fn, *args, **kwargs))

    def stop(self) -> None:
        """Answers nobody else."""
        self.pool.shutdown(wait=False, cancel_futures=True)


class Batches(CBGenerateManager):
    """Continuous batching, which lets go of requests that nobody waits for."""

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id: str):
        """As the library does."""
        try:
            return await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)
        except asyncio.CancelledError:
            self._cb.cancel_request(request_id)
            raise


class State(GenerationState):
    """Has one manager, for the one model.

    Attributes:
        inside: Number of requests that are being answered or wait.
        readers: How many prompts are read at once.
    """

    def __init__(self, model: UltraFuserForCausalLM, continuous_batching: bool = False):
        super().__init__(continuous_batching=continuous_batching)
        self.inside, self.readers = 0, anyio.CapacityLimiter(2)
        self.manager = Batches(_blocks(model)) if continuous_batching else Threads()
        if continuous_batching:
            # else the first request would choose sampling for all others
            self.manager.init_cb(model, GenerationConfig(**{**model.generation_config.to_dict(), "use_cache": False}))

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        """What answers."""
        return self.manager

    def is_cb_alive(self) -> bool:
        """Whether it still does."""
        return not isinstance(self.manager, Batches) or self.manager.is_alive()

    def shutdown(self) -> None:
        """Ends what answers."""
        self.manager.stop()


# ------------------------------------------------------------------------------------------------------ the server


def application(
    model: UltraFuserForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    hosts: Collection[str],
    origins: Collection[str] = (),
    key: str | None = None,
    continuous_batching: bool = False,
    template_variables: dict | None = None,
) -> ASGIApp:
    """A server of one model.

    Args:
        model: A fused model.
        tokenizer: Its tokenizer.
        name: The only one by which requests may name it.
        hosts: From `guarding.host_names`.
        origins: Of web pages that may ask.
        key: That requests must bring.
        continuous_batching: Whether one paged cache holds all requests. Sampling is the model's own then, for all.
        template_variables: Of the chat template, where a request does not set them.

    Raises:
        ValueError: If the model cannot be batched so.
    """
    state = State(model, continuous_batching)
    served = OneModel(name, ServedModel(model, tokenizer), ServedTokenizer(tokenizer))
    limit = model.config.max_position_embeddings
    routes = [
        Route(path, Answering(kind, served, state, limit, template_variables or {}), methods=["POST"])
        for path, kind in KINDS.items()
    ]
    routes.append(Route("/v1/models", lambda _: JSONResponse({"object": "list", "data": [_listed(name)]})))
    routes.append(Route("/health", lambda _: _health(state)))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        state.shutdown()

    in_words = {HTTPException: _in_words, Exception: _in_words}
    inner: ASGIApp = Starlette(routes=routes, exception_handlers=in_words, lifespan=lifespan)
    most = max(LEAST_BYTES, BYTES_PER_TOKEN * (limit or 0))
    inner = Guard(inner, hosts=hosts, origins=origins, key=key, most_bytes=most, open_paths=("/health",))
    if origins:
        from starlette.middleware.cors import CORSMiddleware

        headers = ["Authorization", "Content-Type"]
        inner = CORSMiddleware(inner, allow_origins=list(origins), allow_methods=["POST"], allow_headers=headers)
    return inner


def _listed(name: str) -> dict:
    return Model(id=name, object="model", created=0, owned_by="ultrafuser").model_dump()


def _health(state: GenerationState) -> JSONResponse:
    alive = state.is_cb_alive()
    return JSONResponse({"status": "ok" if alive else "unhealthy"}, 200 if alive else 503)


def _in_words(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):
        return refusal(error.status_code, str(error.detail), error.headers)
    return refusal(500, f"The server failed: {type(error).__name__}.")


def _blocks(model: UltraFuserForCausalLM) -> ContinuousBatchingConfig | None:
    """Of the paged cache. On a GPU the library fits it to the memory; on a CPU it would take all of the machine's."""
    if model.device.type != "cpu":
        return None
    blocks = math.ceil((model.config.max_position_embeddings or 0) / ContinuousBatchingConfig().page_size)
    return ContinuousBatchingConfig(num_blocks=AT_ONCE * (1 + blocks), max_batch_tokens=512)


class Answering:
    """Reads requests of one kind, refuses what cannot be answered, and gives the rest to transformers' handler."""

    def __init__(self, kind: Kind, served: OneModel, state: State, limit: int | None, template_variables: dict):
        self.kind, self.served, self.state, self.limit = kind, served, state, limit
        self.template_variables, self.tokenizer = template_variables, served.tokenizer.tokenizer_itself
        self.handler = kind.handler(served, state)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.state.inside >= AT_ONCE + WAITING:
            message = f"{self.state.inside} requests are being answered or wait, which is the most. Ask again later."
            raise HTTPException(503, message, {"Retry-After": "5"})
        self.state.inside += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self.state.inside -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "A request is JSON: send the header `Content-Type: application/json`.")
        data, asked = await request.body(), Asked()
        _ASKED.set(asked)
        answer = asyncio.ensure_future(self._handled(data, asked))
        gone = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                gone.cancel()
                await _response(answer)(scope, receive, send)
        finally:
            asked.over.set()
            answer.cancel()
            gone.cancel()

    async def _handled(self, data: bytes, asked: Asked) -> Response:
        """What the handler makes of a request."""
        reading = anyio.to_thread.run_sync(self._read, data, abandon_on_cancel=True, limiter=self.state.readers)
        body, asked.ids, seed = await reading
        asked.seed = secrets.randbits(63) if seed is None else seed
        # a name that the client chose could be another request's
        return await self.handler.handle_request(body, str(uuid.uuid4()))

    def _read(self, data: bytes) -> tuple[dict, list[int], int | None]:
        """A request's fields for the handler, its prompt, and its seed.

        Raises:
            HTTPException: If it cannot be answered.
        """
        try:
            body = self.kind.fields.model_validate_json(data).model_dump(exclude_none=True)
        except ValidationError as error:
            raise HTTPException(422, _first(error)) from error
        name = self.served.force_model
        if body.get("model", name) != name:
            raise HTTPException(
                400, f"This server has one model, {name!r}, but the request names {body['model'][:200]!r}."
            )
        if self.state.use_continuous_batching(self.served.model, Modality.LLM):
            own = [field for field in SHARED if field in body]
            if own:
                raise HTTPException(
                    400, f"With continuous batching all requests share the model's sampling, but this sets {own}."
                )
        vocabulary = self.served.model.config.vocab_size
        if any(not (_TOKEN.fullmatch(t) and int(t) < vocabulary) for t in body.get("logit_bias", ())):
            raise HTTPException(400, f"`logit_bias` is by token, a number below {vocabulary}.")
        ids = self._prompt(body)
        if not ids:
            raise HTTPException(400, "The prompt has no tokens, and there is nothing to continue.")
        given = (
            body.pop("max_completion_tokens", None),
            body.pop("max_tokens", None),
            body.pop("max_output_tokens", None),
        )
        default = max(self.served.model.generation_config.max_new_tokens or 0, DEFAULT_TOKENS)
        asked = next((most for most in given if most is not None), default)
        if self.limit is not None and len(ids) >= self.limit:
            raise HTTPException(
                400,
                f"The prompt has {len(ids)} tokens, but the model reads {self.limit}, its answer included. Shorten it.",
            )
        body[self.kind.length] = asked if self.limit is None else min(asked, self.limit - len(ids))
        return body, ids, body.pop("seed", None)

    def _prompt(self, body: dict) -> list[int]:
        handler = self.kind.handler
        if handler is CompletionHandler:
            return self.tokenizer(body["prompt"])["input_ids"]
        if self.tokenizer.chat_template is None:
            raise HTTPException(400, "The model has no chat template. Send the text to continue to /v1/completions.")
        variables = {**self.template_variables, **body.pop("chat_template_kwargs", {})}
        tools = body.get("tools")
        try:
            if handler is ResponseHandler:
                messages, tools = handler._normalize_input(body), handler._normalize_tools(tools)
            else:
                messages = body["messages"]
            messages = handler.get_processor_inputs_from_messages(messages, Modality.LLM)
            text = render_chat(self.tokenizer, messages, tools=tools, variables=variables)
        except RenderingError as error:
            raise HTTPException(400, f"The model's chat template cannot render this conversation: {error}.") from error
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise HTTPException(
                400, f"The conversation has not the form of OpenAI's: {type(error).__name__}: {error}"
            ) from error
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def serve(folder: str, host: str, port: int, key: str | None, loading: dict, **settings) -> None:
    """Serves a fused folder until it is stopped.

    Args:
        folder: Of a fused model, and its name in requests.
        host: Address to listen on.
        port: Its port.
        key: That requests must bring.
        loading: Of `from_pretrained`.
        settings: Of `application`.

    Raises:
        OSError: If there is no such model, or the port is taken.
        ValueError: If it is a model of another kind, or has no tokenizer.
    """
    logging.set_verbosity_error()
    model, tokenizer = open_fused(folder, **loading)
    app = application(model, tokenizer, folder, key=key, **settings)
    run(app, host, port)


def _response(answer: asyncio.Future) -> Response:
    """What a handler returned or raised."""
    try:
        return answer.result()
    except HTTPException:
        raise
    except CBWorkerDeadError as error:
        raise HTTPException(
            503, "Continuous batching has ended with an error. The server must be started again."
        ) from error
    except (FailedError, AbandonedError) as error:
        raise HTTPException(500, str(error)) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise HTTPException(
            400, f"This cannot be answered as it was asked: {type(error).__name__}: {error}"
        ) from error


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"`{place}`: {first['msg']}." if place else f"{first['msg']}."
