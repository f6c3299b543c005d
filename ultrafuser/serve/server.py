"""One fused model behind the handlers of transformers' OpenAI-compatible server.

The handlers know OpenAI's protocol. What they are given is ours: one model that nothing unloads, requests whose fields
have been checked, prompts that have been read and fit, and threads in which requests are answered at once. What is
used of `transformers.cli.serving` is listed in `tests/contracts/test_transformers_contract.py`.
"""

import asyncio
import re
import secrets
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import torch
from openai.types import Model
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import CBWorkerDeadError, GenerationState, Modality

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.fusions_ultrafuser import fusion_class
from trainers.template_sandbox import RenderingError, render_chat

from ..compat import messages_and_tools
from ..route.prompt_route import PromptRoute
from . import served_model
from .guard import LEAST_BYTES, Access, Guard, refusal
from .request_fields import KINDS, SHARED, Kind, first_fault
from .served_model import ASKED, AbandonedError, Asked, FailedError, OneModel, ServedModel, ServedTokenizer, State


WAITING = 256  # requests that wait for their turn
BYTES_PER_TOKEN = 16  # of a body: what the longest prompt may take, escaped
_TOKEN = re.compile(r"0|[1-9][0-9]{0,18}")
DEFAULT_TOKENS = 1024  # of an answer, as transformers' server has it


def application(
    model: UltraFuserForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    access: Access,
    *,
    continuous_batching: bool = False,
    template_variables: dict | None = None,
    decoding: dict | None = None,
    route: PromptRoute | None = None,
) -> ASGIApp:
    """A server of one model.

    Args:
        model: A fused model.
        tokenizer: Its tokenizer.
        name: The only one by which requests may name it.
        access: Who may ask.
        continuous_batching: Whether one paged cache holds all requests. Sampling is the model's own then, for all.
        template_variables: Of the chat template, where a request does not set them.
        decoding: Options of `generate`, for all requests.
        route: Chooses who answers. Default: the gate, token by token, times the prior of a request.

    Raises:
        ValueError: If the model cannot be batched so.
    """
    state = State(model, continuous_batching)
    served = OneModel(name, ServedModel(model, tokenizer, decoding, route), ServedTokenizer(tokenizer))
    limit = model.config.max_position_embeddings
    routes = [
        Route(path, Answering(kind, served, state, limit, template_variables or {}), methods=["POST"])
        for path, kind in KINDS.items()
    ]
    listed = Model(id=name, object="model", created=0, owned_by="ultrafuser").model_dump()
    routes.append(Route("/v1/models", lambda _: JSONResponse({"object": "list", "data": [listed]})))
    routes.append(Route("/health", lambda _: _health(state)))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        state.shutdown()

    in_words = {HTTPException: _in_words, Exception: _in_words}
    inner: ASGIApp = Starlette(routes=routes, exception_handlers=in_words, lifespan=lifespan)
    most = max(LEAST_BYTES, BYTES_PER_TOKEN * (limit or 0))
    inner = Guard(inner, access, most_bytes=most, open_paths=("/health",))
    if access.origins:
        from starlette.middleware.cors import CORSMiddleware

        allowed = {"allow_methods": ["POST"], "allow_headers": ["Authorization", "Content-Type"]}
        inner = CORSMiddleware(inner, allow_origins=list(access.origins), **allowed)
    return inner


def _health(state: GenerationState) -> JSONResponse:
    alive = state.is_cb_alive()
    return JSONResponse({"status": "ok" if alive else "unhealthy"}, 200 if alive else 503)


def _in_words(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):
        return refusal(error.status_code, str(error.detail), error.headers)
    return refusal(500, f"The server failed: {type(error).__name__}.")


class Answering:
    """Reads requests of one kind, refuses what cannot be answered, and gives the rest to transformers' handler."""

    def __init__(self, kind: Kind, served: OneModel, state: State, limit: int | None, template_variables: dict):
        self.kind, self.served, self.state, self.limit = kind, served, state, limit
        self.template_variables, self.tokenizer = template_variables, served.tokenizer.tokenizer_itself
        self.handler = kind.handler(served, state)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.state.inside >= served_model.AT_ONCE + WAITING:
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
        ASKED.set(asked)
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
        """Returns the answer of the handler to a request."""
        reading = anyio.to_thread.run_sync(self._read, data, abandon_on_cancel=True, limiter=self.state.readers)
        body, asked.ids, seed, asked.prior = await reading
        asked.seed = secrets.randbits(63) if seed is None else seed
        # a name that the client chose could be another request's
        response = await self.handler.handle_request(body, str(uuid.uuid4()))
        if isinstance(response, StreamingResponse) and self.kind.done:
            response.body_iterator = _done(response.body_iterator)
        return response

    def _read(self, data: bytes) -> tuple[dict, list[int], int | None, torch.Tensor | None]:
        """A request's fields for the handler, its prompt, its seed, and its prior on the gate.

        Raises:
            HTTPException: If it cannot be answered.
        """
        try:
            body = self.kind.fields.model_validate_json(data).model_dump(exclude_none=True)
        except ValidationError as error:
            raise HTTPException(422, first_fault(error)) from error
        name = self.served.force_model
        if body.get("model", name) != name:
            raise HTTPException(
                400, f"This server has one model, {name!r}, but the request names {body['model'][:200]!r}."
            )
        own = [field for field in SHARED if field in body]
        if own and self.state.use_continuous_batching(self.served.model, Modality.LLM):
            raise HTTPException(
                400, f"With continuous batching all requests share the model's sampling and gate, but this sets {own}."
            )
        vocabulary = self.served.model.config.vocab_size
        if any(not (_TOKEN.fullmatch(t) and int(t) < vocabulary) for t in body.get("logit_bias", ())):
            raise HTTPException(400, f"`logit_bias` is by token, a number below {vocabulary}.")
        prior = self._prior(body.pop("gate_prior", None))
        ids = self._prompt(body)
        if not ids:
            raise HTTPException(400, "The prompt has no tokens, and there is nothing to continue.")
        given = [body.pop(f"max_{kind}tokens", None) for kind in ("completion_", "", "output_")]
        default = max(self.served.model.generation_config.max_new_tokens or 0, DEFAULT_TOKENS)
        asked = next((most for most in given if most is not None), default)
        if self.limit is not None and len(ids) >= self.limit:
            raise HTTPException(
                400,
                f"The prompt has {len(ids)} tokens, but the model reads {self.limit}, its answer included. Shorten it.",
            )
        body[self.kind.length] = asked if self.limit is None else min(asked, self.limit - len(ids))
        return body, ids, body.pop("seed", None), prior

    def _prior(self, weights: dict[str, float] | None) -> torch.Tensor | None:
        """Returns a request's weights of specialists, none of those that it does not name. Shape (1, specialists)."""
        if weights is None:
            return None
        names = self.served.model.config.specialist_names
        if self.served.model.config.signed_weights is not None:
            raise HTTPException(
                400, "`gate_prior` multiplies shares that sum to 1, but this model's weights are signed."
            )
        if not fusion_class(self.served.model.config.fusion).reads_gate:
            raise HTTPException(
                400, "`gate_prior` multiplies the gate's weights, which this model's fusion rule does not read."
            )
        prior = torch.tensor([[weights.get(name, 0.0) for name in names]])
        if set(weights) - set(names) or not prior.any():
            raise HTTPException(
                400,
                f"`gate_prior` weighs specialists by name, {names}, one of them above 0, but it is {weights!s:.200}.",
            )
        return prior

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
                messages, tools = messages_and_tools(handler, body)
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


async def _done(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yields a stream's events, and the one by which OpenAI's clients know its end."""
    async for event in events:
        yield event
    yield "data: [DONE]\n\n"


def _response(answer: asyncio.Future) -> Response:
    """Returns the handler's answer, or raises its error as an HTTP one."""
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
