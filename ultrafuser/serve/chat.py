"""A chat in the terminal, every token coloured by the specialist that leads."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock

import torch
from rich.console import Console
from rich.text import Text
from tokenizers.decoders import DecodeStream
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.gate_base_ultrafuser import GateOutput

from ..plain import plain
from ..pretrained import generating, prompt_ids
from ..reports.colours import assign
from ..reports.terminal import speaker_style
from ..route.prompt_route import PromptRoute


COMMANDS = "/who: who spoke   /reset: begin anew   /quit: leave"
TURN_TOKENS = 512


_REGISTERING = Lock()
_FOLLOWED: ContextVar[tuple[object, ...]] = ContextVar("followed", default=())


@contextmanager
def followed(gate: nn.Module, follow: Callable) -> Iterator[None]:
    """While it is open, `follow` is called after the gate as its forward hooks are, for this thread alone.

    A hook is the gate's, and the gate is every thread's: another one may be in the middle of an answer of its own.
    """
    mine, before = object(), _FOLLOWED.get()
    _FOLLOWED.set((*before, mine))
    # torch numbers hooks by a counter of all threads
    with _REGISTERING:
        hook = gate.register_forward_hook(lambda *call: follow(*call) if mine in _FOLLOWED.get() else None)
    try:
        yield
    finally:
        hook.remove()
        _FOLLOWED.set(before)


class Speech(BaseStreamer):
    """Follows an answer while it is generated.

    Args:
        tokenizer: Of the model.
        say: Called with each piece of text and the gate weights of the token that completed it. Shape (specialists,).

    Attributes:
        text: What has been said so far.
        weights: Gate weights of each token so far. Shapes (specialists,).
        next_weights: Those of the token that comes next. Shape (specialists,).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Callable[[str, torch.Tensor], None]):
        self.tokenizer, self.say = tokenizer, say
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.text, self.weights, self.prompt_read = "", [], False
        self.next_weights: torch.Tensor | None = None

    def watch(self, gate, inputs, output: GateOutput) -> None:
        """To be called by the gate: the last position's weights are those of the token that comes next."""
        self.weigh(output.weights[:, -1])

    def weigh(self, weights: torch.Tensor) -> None:
        """Is told the gate's weights of the token that comes next. Shape (1, specialists)."""
        self.next_weights = weights[0].float().cpu()

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, which is passed over, and then every new token."""
        if not self.prompt_read:
            self.prompt_read = True
            return
        for token in value.flatten().tolist():
            self.weights.append(self.next_weights)
            # nothing until a character is whole
            piece = self.decoder.step(self.tokenizer.backend_tokenizer, token)
            if piece:
                self.text += piece
                self.say(piece, self.weights[-1])

    def end(self) -> None:
        """Takes note that nothing more comes."""


@torch.inference_mode()
def speak(
    model: UltraFuserForCausalLM,
    ids: torch.Tensor,
    speech: Speech,
    max_new_tokens: int,
    *,
    route: PromptRoute | None = None,
    **settings,
) -> None:
    """Generates an answer, which `speech` follows.

    Args:
        model: A fused model.
        ids: What it reads, from `prompt_ids`. Shape (1, seq).
        speech: Told about every token.
        max_new_tokens: Of the answer; fewer if the model reads no more.
        route: Chooses who answers. Default: the gate, token by token.
        settings: Of `generate`.

    Raises:
        ValueError: If the conversation has become too long.
    """
    limit = model.config.max_position_embeddings
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - ids.shape[-1])
    if room < 1:
        raise ValueError(f"The conversation has {ids.shape[-1]} tokens and the model reads {limit}.")
    ids = ids.to(model.device)
    settings = {"max_new_tokens": room, "tokenizer": speech.tokenizer, **settings}
    with followed(model.model.fusion_gate, speech.watch), generating(model):
        answering, options, prior = (route or PromptRoute(model, speech.tokenizer))(ids)
        if answering is not model:
            # its gate says nothing
            speech.weigh(prior)
        answering.generate(ids, attention_mask=torch.ones_like(ids), streamer=speech, **options, **settings)


class Chat:
    """A conversation with a fused model.

    Args:
        model: A fused model.
        tokenizer: Its tokenizer, with a chat template or without: each line is continued as plain text then.
        console: Where to print.
        max_new_tokens: Of one answer.
        route: Chooses who answers. Default: the gate, token by token.
        settings: Of `generate`.
    """

    def __init__(
        self,
        model: UltraFuserForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        console: Console,
        *,
        max_new_tokens: int = TURN_TOKENS,
        route: PromptRoute | None = None,
        settings: dict | None = None,
    ):
        self.model, self.tokenizer, self.console, self.max_new_tokens = model, tokenizer, console, max_new_tokens
        self.names, self.settings = model.config.specialist_names, {"route": route, **(settings or {})}
        self.messages: list[dict[str, str]] = []
        self.speech: Speech | None = None

    def run(self, lines: Iterable[str]) -> None:
        """Answers line by line, until they end or one is /quit."""
        if self.tokenizer.chat_template is None:
            self.console.print("This model has no chat template: each line is continued as plain text.", style="dim")
        for line in map(str.strip, lines):
            if line == "/quit":
                return
            if line == "/reset":
                self.messages.clear()
            elif line == "/who":
                self.console.print(self.who())
            elif line.startswith("/"):
                self.console.print(Text(plain(f"There is no {line.split()[0]}. {COMMANDS}")))
            elif line:
                self.answer(line)

    def answer(self, prompt: str) -> str:
        """Prints the answer to a prompt while it is generated. Interrupted, it keeps what was said so far.

        Returns:
            The answer; empty if the conversation has become too long.
        """
        said = [*self.messages, {"role": "user", "content": prompt}]
        speech = self.speech = Speech(self.tokenizer, self._print)
        try:
            speak(self.model, prompt_ids(self.tokenizer, said), speech, self.max_new_tokens, **self.settings)
        except ValueError as error:
            self.console.print(Text(f"{plain(error)} Begin anew with /reset."))
            return ""
        except KeyboardInterrupt:
            pass
        self.console.print()
        self.messages = [*said, {"role": "assistant", "content": speech.text}]
        return speech.text

    def who(self) -> Text:
        """Mean gate weight of each specialist over the last answer."""
        if self.speech is None or not self.speech.weights:
            return Text("Nobody has spoken yet.")
        return speakers(self.names, torch.stack(self.speech.weights).mean(0).tolist())

    def _print(self, piece: str, weights: torch.Tensor) -> None:
        print_piece(self.console, self.names, piece, weights.tolist())


def print_piece(console: Console, names: list[str], piece: str, weights: list[float]) -> None:
    """Prints a piece of an answer in the colour of the specialist that leads.

    Args:
        console: Where to print.
        names: Of the specialists.
        piece: What a token adds to the text.
        weights: Gate weights of the token.
    """
    leader = max(range(len(names)), key=lambda k: abs(weights[k]))
    style = speaker_style(assign(names)[names[leader]], weights[leader], len(names))
    text = Text()
    for line in plain(piece).splitlines(keepends=True):
        # a line's end without a style, or colour would fill the rest of the line
        body = line.rstrip("\n")
        text.append(body, style)
        text.append(line[len(body) :])
    console.print(text, end="", soft_wrap=True)


def speakers(names: list[str], mean: list[float]) -> Text:
    """Tells each specialist's mean gate weight, in its colour."""
    colours, text = assign(names), Text()
    for name, weight in zip(names, mean, strict=True):
        text.append(f" {name} ", speaker_style(colours[name], 1.0, len(names))).append(f" {weight:.0%}  ")
    return text


def typed(console: Console) -> Iterator[str]:
    """Lines as somebody types them. Ends with the end of input, and with an interrupt between two answers."""
    console.print(COMMANDS, style="dim")
    while True:
        try:
            yield console.input("[bold]> [/bold]")
        except (EOFError, KeyboardInterrupt):
            return
