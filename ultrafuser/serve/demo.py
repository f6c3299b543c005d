"""A web page to talk to a fused model: every token coloured by who speaks, and a gate that can be steered."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from html import escape
from pathlib import Path
from queue import SimpleQueue
from threading import Condition, Event, Thread
from typing import Annotated

import gradio as gr
import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send
from torch import nn
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.gate_base_ultrafuser import GateOutput

from ..reports.colours import assign, css
from .chat import Speech, followed, prompt_ids, speak
from .guard import LEAST_BYTES, Access, Guard, refusal, replayed


LARGEST_BIAS, LEAST_SCORE = 30.0, -20.0  # in nats; the one lifts the other above whoever leads
Pieces = list[tuple[str, list[float]]]  # of an answer, with the gate weights of each
AT_ONCE, WAITING = 32, 64  # answers that are generated, and questions that wait for it
LISTEN_SECONDS = 15.0  # in which who asks must begin to listen, and who is answered ends it
REMEMBERED_SECONDS = 3600  # of a conversation that does not go on
# what the page asks for, by the beginning of the path
ASKED_FOR = {
    "GET": (
        *("/config", "/theme.css", "/assets/", "/static/", "/svelte/", "/favicon.ico", "/manifest.json"),
        *(f"/gradio_api/{path}" for path in ("queue/data", "heartbeat/", "startup-events", "info", "app_id")),
    ),
    "POST": tuple(f"/gradio_api/{path}" for path in ("queue/join", "cancel", "reset")),
}

CSS = Path(__file__).with_name("demo.css").read_text()


@contextmanager
def steered(gate: nn.Module, temperature: float = 1.0, bias: Sequence[float] = ()) -> Iterator[None]:
    """While it is open, the gate weighs by softmax(max(log w / temperature, -20) + bias) of its own weights w.

    Nothing of the model is changed: with temperature 1 and no bias, the weights are the gate's own, bit by bit. Other
    threads' answers are not steered.

    Args:
        gate: Of a fused model.
        temperature: Above 1, weights are more alike; near 0, the leader speaks alone.
        bias: Added to each specialist's score, in nats. Default: none.
    """
    if temperature == 1 and not any(bias):
        yield
        return
    if gate.signed is not None:
        raise ValueError(
            "Shares are steered, but this model's weights are signed. Leave temperature and bias as they are."
        )

    def steer(gate, inputs, output: GateOutput) -> GateOutput:
        weights = output.weights
        # lower ones are as good as none, and could not be lifted by any bias
        scores = (weights.log() / temperature).clamp_min(LEAST_SCORE)
        steered = (scores + torch.tensor(bias, dtype=weights.dtype, device=weights.device)).softmax(-1)
        return output._replace(weights=steered)

    with followed(gate, steer):
        yield


def stream(
    model: UltraFuserForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    bias: Sequence[float] = (),
) -> Iterator[tuple[str, list[float]]]:
    """An answer while it is generated. Closed early, it stops at the next token.

    Args:
        model: A fused model.
        tokenizer: Its tokenizer.
        messages: The conversation, in the form of chat templates.
        max_new_tokens: Of the answer.
        temperature: See `steered`.
        bias: See `steered`.

    Yields:
        Pieces of text, and the gate weights of the token that completed each.

    Raises:
        ValueError: If the conversation has become too long, or steering would have no effect.
    """
    if (temperature != 1 or any(bias)) and not model.model.fusion_rule.reads_gate:
        raise ValueError(
            "The gate is steered, but this model's fusion rule reads none. Leave temperature and bias as they are."
        )
    ids = prompt_ids(tokenizer, messages)
    pieces: SimpleQueue = SimpleQueue()
    closed = Event()
    speech = Speech(tokenizer, lambda piece, weights: pieces.put((piece, weights.tolist())))
    stop = StoppingCriteriaList([lambda ids, scores, **_: torch.full(ids.shape[:1], closed.is_set()).to(ids.device)])

    def generate() -> None:
        end = None
        try:
            with steered(model.model.fusion_gate, temperature, bias):
                speak(model, ids, speech, max_new_tokens, stopping_criteria=stop)
        except Exception as error:
            end = error
        pieces.put(end)

    Thread(target=generate, daemon=True).start()
    try:
        while isinstance(piece := pieces.get(), tuple):
            yield piece
    finally:
        closed.set()
    if piece is not None:
        raise piece


class _Join(BaseModel):
    """Fields that the page sends when a button is pressed."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    data: list[str | float | None]
    fn_index: int
    session_hash: Annotated[str, Field(min_length=1, max_length=100)]


class Page:
    """Lets through what the page asks for, no uploads among it, and knows which of its visitors listen.

    Attributes:
        app: Behind it.
        functions: Numbers of what its buttons do.
        answered: Sessions that are being answered, and what to set to stop.
    """

    def __init__(self):
        self.app: ASGIApp | None = None
        self.functions: Collection[int] = ()
        self.listening, self.changed = Counter(), Condition()
        self.answered: dict[str, Event] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"]
        if not (path == "/" or path.startswith(ASKED_FOR.get(scope["method"], ()))):
            return await refusal(404, "The page has no such part.")(scope, receive, send)
        if path.startswith("/gradio_api/queue/join"):
            body = await Request(scope, receive).body()
            if not self._is_pressed(body):
                return await refusal(422, "The page sends text, and a number of each slider.")(scope, receive, send)
            receive = replayed(body, receive)
        if path != "/gradio_api/queue/data":
            return await self.app(scope, receive, send)
        session = QueryParams(scope["query_string"]).get("session_hash")
        self._count(session, 1)
        try:
            await self.app(scope, receive, send)
        finally:
            self._count(session, -1)

    def _is_pressed(self, body: bytes) -> bool:
        """Returns whether these are the fields that a button of the page sends."""
        try:
            pressed = _Join.model_validate_json(body)
        except ValidationError:
            return False
        prompt, state, *sliders = pressed.data or (None, None)
        numbers = all(isinstance(value, float) for value in sliders)
        return numbers and not isinstance(prompt, float) and state is None and pressed.fn_index in self.functions

    def _count(self, session: str | None, more: int) -> None:
        with self.changed:
            self.listening[session] += more
            if not self.listening[session]:
                del self.listening[session]
            self.changed.notify_all()

    def listens(self, session: str | None, seconds: float = 0) -> bool:
        """Returns whether a visitor listens, or does within some time."""
        with self.changed:
            return self.changed.wait_for(lambda: session in self.listening, seconds)

    def stop(self, request: gr.Request) -> None:
        """Ends the answer of a session, if there is one, and waits for it."""
        # gradio's cancels= does too, but at times the page then shows "Error" for what was on its way
        with self.changed:
            if stopped := self.answered.get(request.session_hash):
                stopped.set()
                self.changed.wait_for(lambda: self.answered.get(request.session_hash) is not stopped, LISTEN_SECONDS)

    @contextmanager
    def answering(self, session: str | None) -> Iterator[Event]:
        """While it is open, a session is answered. The event says whether to stop."""
        stopped = Event()
        with self.changed:
            self.answered[session] = stopped
        try:
            yield stopped
        finally:
            with self.changed:
                self.answered.pop(session, None)
                self.changed.notify_all()


def page(model: UltraFuserForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, visitors: Page) -> gr.Blocks:
    """The page, to be shown with `CSS`.

    Args:
        model: A fused model.
        tokenizer: Its tokenizer. Without a chat template, every message is continued as plain text.
        name: Of the model, as the page shows it.
        visitors: Who knows them: those that do not listen are not answered.
    """
    names = model.config.specialist_names
    colours = assign(names)
    answers = tokenizer.chat_template is not None

    def say(
        request: gr.Request, prompt: str | None, turns: list[str | Pieces], most: int, temperature: float, *bias: float
    ):
        # half of a character that takes two is none
        prompt = (prompt or "").encode("utf-8", "replace").decode()
        if not prompt.strip() or not visitors.listens(request.session_hash, LISTEN_SECONDS):
            yield prompt, turns, talk(turns, colours), legend(turns, colours)
            return
        turns = [*turns, prompt, pieces := []]
        spoken = [turn if isinstance(turn, str) else "".join(piece for piece, _ in turn) for turn in turns[:-1]]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(spoken)]
        settings = {"max_new_tokens": int(most), "temperature": temperature, "bias": bias}
        answer = closing(stream(model, tokenizer, messages, **settings))
        try:
            with answer as found, visitors.answering(request.session_hash) as stopped:
                for piece in found:
                    pieces.append(piece)
                    yield "", turns, talk(turns, colours), legend(turns, colours)
                    if stopped.is_set() or not visitors.listens(request.session_hash):
                        return
        except ValueError as error:
            raise gr.Error(f"{error} Clear it.", print_exception=False) from error

    def clear(request: gr.Request):
        visitors.stop(request)
        return "", [], talk([], colours), legend([], colours)

    with gr.Blocks(title=f"{name}: who speaks?", analytics_enabled=False) as blocks:
        turns = gr.State([], time_to_live=REMEMBERED_SECONDS)
        gr.Markdown(f"# {name}")
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                who = gr.HTML(legend([], colours))
                conversation = gr.HTML(talk([], colours), elem_id="conversation", max_height=480, autoscroll=True)
                prompt = gr.Textbox(
                    show_label=False,
                    container=False,
                    placeholder="Ask something"
                    if answers
                    else "Begin a text: without a chat template, it is continued",
                    elem_id="prompt",
                )
                with gr.Row():
                    send = gr.Button("Send" if answers else "Continue", variant="primary", min_width=80)
                    stop = gr.Button("Stop", min_width=80)
                    anew = gr.Button("Clear", min_width=80)
            with gr.Column(scale=1, min_width=260):
                gr.Markdown("Steer the gate of the next answer. At temperature 1 and bias 0 it is as it was trained.")
                temperature = gr.Slider(0.1, 5.0, value=1.0, step=0.1, label="Gate temperature")
                biases = [
                    gr.Slider(-LARGEST_BIAS, LARGEST_BIAS, value=0.0, step=0.5, label=f"Bias of {n}") for n in names
                ]
                most = gr.Slider(1, 1024, value=256, step=1, label="Tokens at most")
        inputs, outputs = [prompt, turns, most, temperature, *biases], [prompt, turns, conversation, who]
        settings = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": AT_ONCE}
        gr.on([prompt.submit, send.click], say, inputs, outputs, **settings)
        stop.click(visitors.stop, **settings)
        anew.click(clear, None, outputs, **settings)
    return blocks


def application(
    model: UltraFuserForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, access: Access
) -> ASGIApp:
    """The page as a server. It asks nothing of any other host, and tells none anything.

    Args:
        model: A fused model.
        tokenizer: Its tokenizer.
        name: Of the model, as the page shows it.
        access: Who may ask.
    """
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    # grey, because colours are the specialists'
    look = {"theme": gr.themes.Default(primary_hue="slate", **fonts), "css": CSS, "footer_links": []}
    visitors = Page()
    blocks = page(model, tokenizer, name, visitors).queue(max_size=WAITING, api_open=False)
    less = {"ssr_mode": False, "run_history": False, "enable_monitoring": False, "mcp_server": False, "pwa": False}
    visitors.functions = blocks.fns
    visitors.app = gr.mount_gradio_app(FastAPI(openapi_url=None), blocks, "/", **less, **look)
    return Guard(visitors, access, most_bytes=LEAST_BYTES)


def talk(turns: Sequence[str | Pieces], colours: Mapping[str, str]) -> str:
    """A conversation as HTML: what was asked as it is, what was answered coloured by who spoke."""
    shown = [
        f'<div class="user">{escape(turn)}</div>'
        if isinstance(turn, str)
        else f'<div class="assistant">{"".join(_span(*piece, colours) for piece in turn)}</div>'
        for turn in turns
    ]
    nothing = '<div class="nothing">Nobody has spoken yet.</div>'
    return f'<div class="talk" role="log" aria-label="Conversation">{"".join(shown) or nothing}</div>'


def legend(turns: Sequence[str | Pieces], colours: Mapping[str, str]) -> str:
    """The specialists' colours, and their mean gate weights over the last answer."""
    last = turns[-1] if turns else []
    means = [f": {sum(share) / len(share):.0%}" for share in zip(*(weights for _, weights in last), strict=True)]
    marks = (
        f'<span><b style="background:{colour}"></b>{escape(name)}{mean}</span>'
        for (name, colour), mean in zip(colours.items(), means or [""] * len(colours), strict=True)
    )
    return f'<div class="who">{"".join(marks)}</div>'


def _span(text: str, weights: list[float], colours: Mapping[str, str]) -> str:
    weight, leader = max(zip(weights, colours, strict=True), key=lambda one: abs(one[0]))
    told = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(colours, weights, strict=True))
    return f'<span style="{css(colours[leader], weight, len(weights))}" title="{escape(told)}">{escape(text)}</span>'
