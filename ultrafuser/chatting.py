"""A chat in the terminal, every token coloured by the specialist that leads."""

from collections.abc import Iterable, Iterator

import torch
from rich.console import Console
from rich.text import Text
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from modeling_ultrafuser import UltraFuserForCausalLM

from .reports.colours import assign
from .reports.terminal import speaker_style


COMMANDS = "/who: who spoke   /reset: begin anew   /quit: leave"
TURN_TOKENS = 512


class Speech(BaseStreamer):
    """Prints an answer while it is generated.

    Attributes:
        text: What has been said so far.
        weights: Gate weights of each token so far. Shapes (specialists,).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: list[str], console: Console):
        self.backend, self.names, self.console = tokenizer.backend_tokenizer, names, console
        self.colours = assign(names)
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.text, self.weights, self.prompt_read = "", [], False

    def watch(self, gate, inputs, gate_weights: torch.Tensor) -> None:
        """To be called by the gate: the last position's weights are those of the token that comes next."""
        self.weights.append(gate_weights[0, -1].float().cpu())

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, which is passed over, and then every new token."""
        if not self.prompt_read:
            self.prompt_read = True
            return
        for token in value.flatten().tolist():
            # nothing until a character is whole
            piece = self.decoder.step(self.backend, token)
            if piece:
                self.text += piece
                self.console.print(self._coloured(piece), end="", soft_wrap=True)

    def end(self) -> None:
        """Ends the line."""
        self.console.print()

    def _coloured(self, piece: str) -> Text:
        weight, leader = self.weights[-1].max(-1)
        name = self.names[leader]
        text = Text()
        for line in piece.splitlines(keepends=True):
            # a line's end without a style, or colour would fill the rest of the line
            body = line.rstrip("\n")
            text.append(body, speaker_style(self.colours[name], weight.item(), len(self.names)))
            text.append(line[len(body) :])
        return text


class Chat:
    """A conversation with a fused model.

    Args:
        model: A fused model.
        tokenizer: Its tokenizer, with a chat template or without: each line is continued as plain text then.
        console: Where to print.
        max_new_tokens: Of one answer.
    """

    def __init__(
        self,
        model: UltraFuserForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        console: Console,
        *,
        max_new_tokens: int = TURN_TOKENS,
    ):
        self.model, self.tokenizer, self.console, self.max_new_tokens = model, tokenizer, console, max_new_tokens
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
                self.console.print(f"There is no {line.split()[0]}. {COMMANDS}")
            elif line:
                self.answer(line)

    @torch.inference_mode()
    def answer(self, prompt: str) -> str:
        """Prints the answer to a prompt while it is generated. Interrupted, it keeps what was said so far.

        Returns:
            The answer; empty if the conversation has become too long.
        """
        ids = self._ids(prompt)
        limit = self.model.config.max_position_embeddings
        room = self.max_new_tokens if limit is None else min(self.max_new_tokens, limit - ids.shape[-1])
        if room < 1:
            self.console.print(
                f"The conversation has {ids.shape[-1]} tokens and the model reads {limit}. Begin anew with /reset."
            )
            return ""
        speech = self.speech = Speech(self.tokenizer, self.model.config.specialist_names, self.console)
        hook = self.model.model.fusion_gate.register_forward_hook(speech.watch)
        try:
            self.model.generate(ids, attention_mask=torch.ones_like(ids), streamer=speech, max_new_tokens=room)
        except KeyboardInterrupt:
            speech.end()
        finally:
            hook.remove()
        self.messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": speech.text}]
        return speech.text

    def who(self) -> Text:
        """Mean gate weight of each specialist over the last answer."""
        if self.speech is None or not self.speech.weights:
            return Text("Nobody has spoken yet.")
        text = Text()
        mean = torch.stack(self.speech.weights).mean(0).tolist()
        for name, weight in zip(self.speech.names, mean, strict=True):
            text.append(f" {name} ", speaker_style(self.speech.colours[name], 1.0, len(mean))).append(
                f" {weight:.0%}  "
            )
        return text

    def _ids(self, prompt: str) -> torch.Tensor:
        if self.tokenizer.chat_template is None:
            ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        else:
            messages = [*self.messages, {"role": "user", "content": prompt}]
            ids = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
        return ids.to(self.model.device)


def typed(console: Console) -> Iterator[str]:
    """Lines as somebody types them. Ends with the end of input, and with an interrupt between two answers."""
    console.print(COMMANDS, style="dim")
    while True:
        try:
            yield console.input("[bold]> [/bold]")
        except (EOFError, KeyboardInterrupt):
            return
