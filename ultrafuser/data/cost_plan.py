"""Estimates what following a recipe takes: calls, tokens, money and time, without sending anything."""

from collections import Counter, defaultdict

from rich.table import Column, Table

from .recipe import NEEDED, Domain, Recipe
from .synthesis import EMPTY, TOPIC_TOKENS, Maker, expansion_totals
from .teacher import CHARACTERS_PER_TOKEN, cost


class Plan:
    """Counts what a recipe asks for, if every reply has the expected length and can be used.

    Then the requests of a step differ, within a domain, only by how many items they ask for and how many exist
    already: one of each sort is made and counted as often as it would be sent.

    Attributes:
        counts: Calls, prompt tokens and reply tokens by step and domain.
        seconds: Time that it takes, from the limits and the speed of the teacher.
        records: Conversations that come out.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Counts, which takes moments whatever the size."""
        self.recipe, self.records = recipe, 0
        self.counts: dict[tuple[str, str], Counter] = defaultdict(Counter)
        # requests of all domains that may be under way at once: of one step, turn and round
        self._rounds: dict[tuple, Counter] = defaultdict(Counter)
        self._maker = Maker(recipe)
        for name, domain in recipe.domains.items():
            self._follow(name, domain)
        # in the order of the steps, whatever the domain
        self.counts = dict(sorted(self.counts.items(), key=lambda item: [*NEEDED].index(item[0][0])))
        self.seconds = sum(map(self._seconds, self._rounds.values()))

    def _follow(self, name: str, domain: Domain) -> None:
        """The steps of `making`, with texts of the foreseen length and numbers in place of rows."""
        topic, instruction = ("x" * CHARACTERS_PER_TOKEN * n for n in (TOPIC_TOKENS, domain.instruction_tokens))
        first, strong, weak = expansion_totals(domain)
        row = EMPTY | {"domain": name}
        self._lists("meta_topics", row, topic, [(domain.meta_topics, 1)])
        row["topic"] = topic
        self._lists("sub_topics", row, topic, spread(domain.sub_topics, domain.meta_topics))
        row["subtopic"] = topic
        self._lists("instructions", row, instruction, spread(first, domain.sub_topics))
        row["instruction"] = instruction
        self._lists("strong", row, instruction, spread(strong, first))
        self._lists("weak", row, instruction, spread(weak, first))
        number = domain.instructions
        if domain.skills:
            start, pairs = EMPTY | {"domain": name}, domain.skills.pairs + domain.skills.across
            self._lists("skills", start, topic, [(domain.skills.number, 1)])
            self._lists(
                "pairs",
                start | {"topic": "skills", "skills": [topic] * domain.skills.together},
                instruction,
                [(1, pairs)],
            )
            number += pairs
        self._count("harder", row, None, [], round(domain.harder * number))
        said = [{"role": "user", "content": instruction}]
        for turn in range(1, domain.turns + 1):
            if turn > 1:
                self._count("turns", row | {"messages": said}, None, [], number, turn)
                said = [*said, {"role": "user", "content": instruction}]
            self._count("answers", row | {"messages": said}, None, [], number, turn)
            said = [*said, {"role": "assistant", "content": "x" * CHARACTERS_PER_TOKEN * domain.answer_tokens}]
        self.records += number

    def _lists(self, step: str, row: dict, item: str, wanted: list[tuple[int, int]]) -> None:
        """So many items are wanted of each of so many rows."""
        most = self.recipe.items_per_request
        for number, rows in wanted:
            for found in range(0, number, most):
                self._count(step, row, min(number - found, most), [item] * found, rows, found // most)

    def _count(self, step: str, row: dict, number: int | None, known: list[str], times: int, place: int = 0) -> None:
        """One request, as often as it is sent; `place` tells those apart that wait for each other."""
        if times:
            request = self._maker.request(step, row, number, known, 0)
            tokens_in, tokens_out = request.prompt_tokens(), request.reply_tokens
            counted = Counter(calls=times, tokens_in=times * tokens_in, tokens_out=times * tokens_out)
            self.counts[step, row["domain"]] += counted
            longest = max(self._rounds[step, place]["longest"], tokens_out)
            self._rounds[step, place] += counted
            self._rounds[step, place]["longest"] = longest

    def _seconds(self, requests: Counter) -> float:
        teacher = self.recipe.teacher
        # a round is not over before its last reply
        replies = max(requests["tokens_out"] / min(teacher.concurrency, requests["calls"]), requests["longest"])
        tokens = requests["tokens_in"] + requests["tokens_out"]
        paces = (requests["calls"], teacher.requests_per_minute), (tokens, teacher.tokens_per_minute)
        return max([replies / teacher.tokens_per_second, *(60 * amount / limit for amount, limit in paces if limit)])

    @property
    def total(self) -> Counter:
        """Calls, prompt tokens and reply tokens of everything."""
        return sum(self.counts.values(), Counter())

    @property
    def money(self) -> float:
        """Returns the cost in the unit of the teacher's prices."""
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
        """Lists the assumptions behind the numbers, the time that follows, and the budget's limits."""
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
                lines.append(f"Budget: {limit:,.10g} ({name}) for {round(wanted, 2):,}; {share}.")
        return "\n".join(lines)


def spread(total: int, rows: int) -> list[tuple[int, int]]:
    """Returns how many each row gets, and how many rows get that many, as `Maker.shares` deals out a total."""
    each, more = divmod(total, rows)
    return [(each + 1, more), (each, rows - more)]


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
