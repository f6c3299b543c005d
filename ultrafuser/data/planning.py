"""What following a recipe will take: calls, tokens, money and time, foreseen without sending anything."""

import json
from collections import Counter, defaultdict
from itertools import count

from rich.table import Column, Table

from .making import TOPIC_TOKENS, Maker, all_instructions, conversations
from .recipe import Recipe
from .teacher import CHARACTERS_PER_TOKEN, Reply, Request, cost


class Plan:
    """What a recipe asks for, found by following it with replies of the foreseen length in place of a teacher's.

    Attributes:
        counts: Calls, prompt tokens and reply tokens by step and domain.
        seconds: Time that it takes, from the limits and the speed of the teacher.
        records: Conversations that come out.
        stopped: None: nothing stops a plan. It is there because a `Teacher` has it.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Follows the recipe: about a minute for half a million calls."""
        self.recipe, self.seconds, self.stopped = recipe, 0.0, None
        self.counts: dict[tuple[str, str], Counter] = defaultdict(Counter)
        self._numbers = count()
        maker = Maker(recipe, self)
        self.records = sum(1 for _ in conversations(maker, all_instructions(maker)))

    def ask(self, requests: list[Request]) -> list[Reply]:
        """Stands in for a teacher: counts, and replies with nonsense of the right length."""
        teacher, tokens, replies = self.recipe.teacher, 0, []
        for request in requests:
            tokens_in, tokens_out = request.prompt_tokens(), request.reply_tokens
            self.counts[request.step, request.domain].update(calls=1, tokens_in=tokens_in, tokens_out=tokens_out)
            tokens += tokens_in + tokens_out
            replies.append(Reply(self._text(request)))
        paces = (len(requests), teacher.requests_per_minute), (tokens, teacher.tokens_per_minute)
        waits = [60 * amount / limit for amount, limit in paces if limit]
        # a round is not over before its last reply
        one_reply = max((r.reply_tokens for r in requests), default=0) / teacher.tokens_per_second
        self.seconds += max([-(-len(requests) // teacher.concurrency) * one_reply, *waits])
        return replies

    def _text(self, request: Request) -> str:
        length = CHARACTERS_PER_TOKEN * request.reply_tokens // (request.number or 1)
        if request.number is None:
            return "x" * length
        return json.dumps({"items": [f"{next(self._numbers):x}".ljust(length, "x") for _ in range(request.number)]})

    @property
    def total(self) -> Counter:
        """Calls, prompt tokens and reply tokens of everything."""
        return sum(self.counts.values(), Counter(calls=0))

    @property
    def money(self) -> float:
        """What it costs, in the unit of the teacher's prices."""
        return cost(self.recipe.teacher, self.total["tokens_in"], self.total["tokens_out"])

    def table(self) -> Table:
        """One line per step and domain, and one for all."""
        numbers = [Column(name, justify="right") for name in ("calls", "tokens in", "tokens out", "cost")]
        table = Table("step", "domain", *numbers)
        for (step, domain), counter in self.counts.items():
            table.add_row(step, domain, *self._cells(counter))
        table.add_section()
        table.add_row("all", "", *self._cells(self.total))
        return table

    def _cells(self, counter: Counter) -> list[str]:
        amounts = [counter["calls"], counter["tokens_in"], counter["tokens_out"]]
        return [*(f"{amount:,}" for amount in amounts), f"{cost(self.recipe.teacher, *amounts[1:]):,.2f}"]

    def assumptions(self) -> str:
        """What the numbers rest on, the time that follows, and what the budget says to it."""
        teacher, budget = self.recipe.teacher, self.recipe.budget
        lengths = "; ".join(
            f"{name}: {d.instruction_tokens} an instruction, {d.answer_tokens} an answer"
            for name, d in self.recipe.domains.items()
        )
        limits = [f"{teacher.concurrency} requests at once", f"{teacher.tokens_per_second:g} tokens per second each"]
        paces = {"requests": teacher.requests_per_minute, "tokens": teacher.tokens_per_minute}
        limits += [f"{limit:,g} {name} per minute" for name, limit in paces.items() if limit]
        lines = [
            f"{self.records:,} conversations, about {_duration(self.seconds)} with {', '.join(limits)}.",
            f"Assumed: {CHARACTERS_PER_TOKEN} characters per token of a prompt; tokens of a reply by domain ({lengths}; "
            f"{TOPIC_TOKENS} a topic or skill); every reply can be used. What cannot is asked for again, at most "
            f"{self.recipe.more_rounds} more times, on top of this.",
        ]
        tokens = self.total["tokens_in"] + self.total["tokens_out"]
        for name, limit, wanted in (("tokens", budget.tokens, tokens), ("money", budget.money, self.money)):
            if limit is not None:
                share = f"it ends at about {limit / wanted:.0%}" if limit < wanted else "it suffices"
                lines.append(f"Budget: {limit:,} ({name}) for {wanted:,.10g}; {share}.")
        return "\n".join(lines)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
