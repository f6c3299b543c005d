"""Requests of OpenAI's protocol: the fields that are read, their limits, and the handler that answers."""

import inspect
from typing import Annotated, Any, NamedTuple

import fastapi  # noqa: F401  without which the handlers are imported, and fail later
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseHandler


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
    """Base of all requests. Fields that are not named here have no effect, or are rejected by the handler."""

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
    # ours: weights of the specialists by name
    gate_prior: Annotated[dict[str, Annotated[float, Field(ge=0, le=1e6)]], Field(max_length=1000)] | None = None
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
    """Kind of request: its fields, its handler, the field of the answer's length, and whether [DONE] ends a stream."""

    fields: type[_Fields]
    handler: type[BaseHandler]
    length: str
    done: bool


KINDS = {
    "/v1/chat/completions": Kind(_Chat, ChatCompletionHandler, "max_tokens", True),
    "/v1/completions": Kind(_Completion, CompletionHandler, "max_tokens", True),
    "/v1/responses": Kind(_Response, ResponseHandler, "max_output_tokens", False),
}
# which continuous batching has once for all requests
SHARED = ("temperature", "top_p", "seed", "frequency_penalty", "stop", "logit_bias", "gate_prior")


def first_fault(error: ValidationError) -> str:
    """Returns the first thing that is wrong with a request, as a sentence."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"`{place}`: {first['msg']}." if place else f"{first['msg']}."
