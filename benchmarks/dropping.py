"""Dropping on three real specialists: reads, losses and time: `python -m benchmarks.dropping --base FOLDER`.

The specialists are a base of 135 million parameters and the quickstart's two adapters, merged into models of their own:
adapters of one base read a token together, so that nothing is saved by leaving some out. A gate is fitted on the
quickstart's conversations as there; and others, which `gate_domain` leads to each domain's own specialist all the while.

Losses are those of held-out answers, in nats per token, and how far they are above the plain way's: the specialists read
each answer once, then the decoder's decisions are run over it token by token, given the answer's tokens instead of its own.
Reads are the passes that the decoder asks for, for each token of an answer, the first included, whose pass reads the prompt. "both" are
answers that need two domains in turn. In what the decoder writes itself, drafts make them fewer: those are counted, too, for the
first prompts of each domain. Times are those of a token that the decoder generates, without the prompt, by the processor's clock,
one text at a time, in turns with the plain way. Writes `results/dropping.json`.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import set_seed
from transformers.generation import BaseStreamer
from transformers.utils import logging

from benchmarks.dropping_subject import fused_model
from benchmarks.timing import compare_ways
from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.gate_base_ultrafuser import GateOutput
from modeling_ultrafuser.inputs_ultrafuser import Tokens
from modeling_ultrafuser.sparsifiers_ultrafuser import sparsifier
from ultrafuser.atomic import write_json
from ultrafuser.decoding import EVERY, KEEP
from ultrafuser.decoding.dropping import Asked, drop_specialists
from ultrafuser.decoding.reading import TextReader, end_tokens
from ultrafuser.evaluation.measurement import HeldOut
from ultrafuser.provenance import provenance
from ultrafuser.quickstart.real_data import HELD_OUT_ROWS, Materials, held_out_by_domain


RESULTS = Path(__file__).parent.parent / "results" / "dropping.json"
EVERIES, KEEPS = (2, 4, 8, 16), ("top_p:0.8", "top_p:0.95", "top_k:2", "top_k:1")
TIMED = ((EVERY, KEEP), (EVERY, "top_k:1"), (4, "top_k:2"))
NEW, SAME = 24, 16  # tokens
WRITTEN = 6  # answers of each domain


class Answer(NamedTuple):
    """A prompt with its answer.

    Attributes:
        domain: Its domain.
        ids: Prompt and answer. Shape (1, seq).
        prompt: Number of tokens of the prompt.
        states: Each specialist's hidden states. Shapes (1, seq, hidden).
    """

    domain: str
    ids: Tensor
    prompt: int
    states: list[Tensor]


def main() -> None:
    """Makes the models, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder of the base, as `ultrafuser quickstart --real` makes it")
    parser.add_argument("--gate", default="mlp:512")
    parser.add_argument("--gate-domain", type=float, nargs="+", default=[0.0, 0.3, 2.0], help="one gate for each")
    parser.add_argument("--answers", type=int, default=18, help="of each domain")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/dropping"), help="folder for models")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    found: dict[str, dict] = {}
    answers: list[Answer] = []
    for strength in options.gate_domain:
        name = f"{options.gate}, gate_domain {strength}" if strength else options.gate
        found[name] = {}
        model, tokenizer = fused_model(options.work, options.base, Materials().adapters, options.gate, strength)
        with torch.no_grad():
            if not answers:  # all gates have the same specialists, which read them once
                held = held_out_by_domain(HELD_OUT_ROWS, tokenizer)
                answers = [a for d, data in held.items() for a in answers_of(model, d, data[: options.answers])]
            for part, measured in measure(model, answers, options.rounds):
                found[name][part] = measured
                print(name, part, measured, flush=True)
                write_json(options.out, {"provenance": provenance(), "gates": found})


def measure(model: UltraFuserForCausalLM, answers: list[Answer], rounds: int) -> Iterator[tuple[str, dict]]:
    """Measures one after another, by name. Without rounds, losses alone."""
    asked = first_prompts(answers)
    yield "losses", losses(model, answers)
    if rounds:
        yield "generated reads", generated(model, answers)
        yield "same tokens", same_tokens(model, asked)
        yield "seconds", times(model, asked, rounds)


def answers_of(model: UltraFuserForCausalLM, domain: str, held: HeldOut) -> list[Answer]:
    """Lets the specialists read every example of a domain once."""
    found = []
    for ids, mask, prompt in zip(held.input_ids, held.attention_mask.bool(), held.prompt.sum(-1), strict=True):
        own = ids[mask][None]
        states = [o.last_hidden_state for o in model.model.reader.read(Tokens(own), None)]
        found.append(Answer(domain, own, int(prompt), states))
    return found


def losses(model: UltraFuserForCausalLM, answers: list[Answer]) -> dict[str, dict]:
    """Measures the plain way, and how far each setting is above it.

    Returns:
        Answered tokens and the plain loss by domain; and for each setting, `n keep`, reads per token and the loss above
        the plain one by domain. Losses are in nats per token.
    """
    settings = [(1, "none"), *((every, keep) for every in EVERIES for keep in KEEPS)]
    sums: dict = {setting: {} for setting in settings}
    for answer in answers:
        logits = logits_of(model, answer)
        for setting in settings:
            nats, reads = forced(model, answer, logits, *setting)
            sums[setting].setdefault(answer.domain, []).append(
                torch.tensor([len(nats), float(nats.double().sum()), reads], dtype=torch.float64)
            )
    totals = {s: {d: torch.stack(own).sum(0).tolist() for d, own in by.items()} for s, by in sums.items()}
    plain = totals.pop(settings[0])
    rows = [
        {
            "every": every,
            "keep": keep,
            "reads": {d: reads / tokens for d, (tokens, _, reads) in by.items()},
            "above plain": {d: (nats - plain[d][1]) / tokens for d, (tokens, nats, _) in by.items()},
        }
        for (every, keep), by in totals.items()
    ]
    return {
        "tokens": {d: tokens for d, (tokens, _, _) in plain.items()},
        "plain": {d: nats / tokens for d, (tokens, nats, _) in plain.items()},
        "rows": rows,
    }


def logits_of(model: UltraFuserForCausalLM, answer: Answer) -> list[Tensor]:
    """Computes each specialist's logits of the answer's tokens. Shapes (1, tokens, vocab)."""
    places, head = slice(answer.prompt - 1, -1), model.lm_head.weight
    pairs = zip(answer.states, model.head_columns(), strict=True)
    return [F.linear(states[:, places], head[:, columns]) for states, columns in pairs]


def forced(
    model: UltraFuserForCausalLM, answer: Answer, logits: list[Tensor], every: int, keep: str
) -> tuple[Tensor, int]:
    """Runs the decoder's decisions over an answer. Returns its tokens' losses, and how many passes were asked for."""
    reader, ends = _Known(model, answer.states), end_tokens(model.generation_config)
    asked = _Forced(reader, sparsifier(keep), every, ends, known=logits, prompt=answer.prompt)
    live = torch.ones(1, dtype=torch.bool)
    steps = [asked.logits(answer.ids[:, :length], live) for length in range(answer.prompt, answer.ids.shape[1])]
    output = (None if own[0] is None else torch.cat(own, 1) for own in zip(*steps, strict=True))
    fused = model.model.fusion_rule.fused(logits, *output)[0]
    return F.cross_entropy(fused, answer.ids[0, answer.prompt :], reduction="none"), asked.reader.passes


class _Known(TextReader):
    """Specialists that have read the whole text already: hands out hidden states as far as they are asked for."""

    def __init__(self, model: UltraFuserForCausalLM, states: list[Tensor]):
        super().__init__(model, {})
        self.known, self.so_far, self.passes = states, [0] * self.count, 0

    def read(self, k: int, input_ids: Tensor) -> Tensor:
        start, self.so_far[k] = self.so_far[k], input_ids.shape[1]
        self.passes += 1
        return self.known[k][:, start : input_ids.shape[1]]

    def tokens_read(self) -> list[int]:
        return self.so_far


class _Forced(Asked):
    """Returns what the gate returned instead of logits: those of many tokens at once are cheaper.

    Args:
        *asked: As for `Asked`.
        known: Each specialist's logits of the answer's tokens. Shapes (1, tokens, vocab).
        prompt: Number of tokens of the prompt.
    """

    def __init__(self, *asked, known: list[Tensor], prompt: int):
        super().__init__(*asked)
        self.known, self.prompt, self.place = known, prompt, 0

    def logits(self, input_ids: Tensor, live: Tensor) -> GateOutput:
        self.place = input_ids.shape[1] - self.prompt
        return super().logits(input_ids, live)

    def would_end(self, output: GateOutput) -> Tensor:
        fused = self.backbone.fusion_rule.fused([own[:, [self.place]] for own in self.known], *output)
        return super().would_end(fused)

    def predicted_by_all(self, fused: Tensor, output: GateOutput) -> GateOutput:
        return output

    def predicted_by_kept(self, states: dict[int, Tensor], output: GateOutput) -> GateOutput:
        return output


def first_prompts(answers: list[Answer]) -> dict[str, Tensor]:
    """Returns the first prompt of every domain. Shapes (1, seq)."""
    return {a.domain: a.ids[:, : a.prompt] for a in reversed(answers)}


def same_tokens(model: UltraFuserForCausalLM, asked: dict[str, Tensor]) -> dict[str, bool]:
    """Compares the tokens of keeping everybody with the plain way's, greedily and drawn with a seed."""
    found = {}
    for name, settings in {"greedy": {"do_sample": False}, "with a seed": {"do_sample": True}}.items():
        texts = []
        for options in ({}, {"custom_generate": drop_specialists, "keep": "top_p:1.0"}):
            set_seed(0)
            texts.append([model.generate(ids, max_new_tokens=SAME, **settings, **options) for ids in asked.values()])
        found[name] = all(map(torch.equal, *texts))
    return found


def times(model: UltraFuserForCausalLM, asked: dict[str, Tensor], rounds: int) -> dict[str, dict]:
    """Measures the seconds of a generated token, one text at a time, and their ratio to the plain way's."""
    ways = {"plain": {}} | _dropping_ways()
    return {
        domain: compare_ways(
            {n: lambda ids=ids, way=way: _a_token(model, ids, way) for n, way in ways.items()}, rounds
        )
        for domain, ids in asked.items()
    }


def generated(model: UltraFuserForCausalLM, answers: list[Answer]) -> dict[str, dict[str, float]]:
    """Counts the specialists' passes for a token that is generated greedily, drafts and the prompt's included, by way and domain."""
    ways, passes = _dropping_ways(), []
    found = {name: {} for name in ways}
    hooks = [s.register_forward_pre_hook(lambda *_: passes.append(1)) for s in model.model.specialists.values()]
    for domain in dict.fromkeys(a.domain for a in answers):
        prompts = [a.ids[:, : a.prompt] for a in answers if a.domain == domain][:WRITTEN]
        for name, way in ways.items():
            passes.clear()
            tokens = sum(
                model.generate(ids, max_new_tokens=NEW, do_sample=False, **way).shape[1] - ids.shape[1]
                for ids in prompts
            )
            found[name][domain] = len(passes) / tokens
    for hook in hooks:
        hook.remove()
    return found


def _dropping_ways() -> dict[str, dict]:
    """Options of `generate` for the ways that are timed, by name."""
    return {
        f"{keep}, every {every}": {"custom_generate": drop_specialists, "every": every, "keep": keep}
        for every, keep in TIMED
    }


def _a_token(model: UltraFuserForCausalLM, ids: Tensor, way: dict) -> dict[str, float]:
    watch = _Stopwatch()
    model.generate(ids, max_new_tokens=NEW, do_sample=False, streamer=watch, **way)
    return {"seconds": (watch.seconds[-1] - watch.seconds[1]) / (len(watch.seconds) - 2)}


class _Stopwatch(BaseStreamer):
    """Writes down when each token is there, the prompt first."""

    def __init__(self):
        self.seconds: list[float] = []

    def put(self, value: Tensor) -> None:
        self.seconds.append(time.process_time())

    def end(self) -> None:
        pass


if __name__ == "__main__":
    main()
