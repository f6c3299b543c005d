"""Hands every question to one specialist: all are held, one answers."""

from collections.abc import Callable

from experiments.real.parts import said
from experiments.real.workshop import Workshop, conversation
from ultrafuser.route.router_words import WordsRouter, fitted, probabilities


# from a workshop and questions to the specialist of each
Chooser = Callable[[Workshop, str, list[str]], list[str]]


def least_perplexed(shop: Workshop, name: str, questions: list[str]) -> list[str]:
    """Chooses the specialist with the least loss on the question."""
    rows = [conversation(question, "") for question in questions]
    found = {n: shop.specialist(n).losses(f"question {name}", rows, prompts=True) for n in shop.names}
    return [min(shop.names, key=lambda n: found[n][i][0]) for i in range(len(questions))]


def trained(shop: Workshop, name: str, questions: list[str]) -> list[str]:
    """Lets a classifier choose that learned from the gates' data which domain a question is of; "both" is left out."""
    data = {domain: rows for domain, rows in shop.gate_data().items() if domain in shop.names}
    texts = [said(row) for rows in data.values() for row in rows]
    labels = [shop.names.index(domain) for domain, rows in data.items() for _ in rows]
    router = WordsRouter(*fitted(texts, labels, len(shop.names)))
    return [shop.names[i] for i in probabilities(router, questions).argmax(-1).tolist()]


CHOOSERS: dict[str, Chooser] = {"prompt perplexity": least_perplexed, "trained": trained}


class Routed:
    """Returns answers and losses of the specialists that a router chooses.

    Args:
        shop: The study's folder.
        choose: How.
    """

    def __init__(self, shop: Workshop, choose: Chooser):
        self.shop, self.choose = shop, choose

    def answers(self, name: str, questions: list[str], longest: int) -> list[str]:
        """Returns the chosen specialist's answer to each question."""
        found = {n: self.shop.specialist(n).answers(name, questions, longest) for n in self.shop.names}
        return [found[n][i] for i, n in enumerate(self.choose(self.shop, name, questions))]

    def losses(self, name: str, rows: list[dict]) -> list[tuple[float, int]]:
        """Returns the chosen specialist's loss on each row."""
        found = {n: self.shop.specialist(n).losses(name, rows) for n in self.shop.names}
        return [found[n][i] for i, n in enumerate(self.choose(self.shop, f"loss {name}", list(map(said, rows))))]

    def seconds(self) -> float:
        """Counts nothing: specialists count what they took."""
        return 0.0


class Oracle:
    """Takes the right specialist of every part and domain: that which solves most, or has the least loss.

    Args:
        shop: The study's folder.
        each: Whether to choose for every question, not for every part.
    """

    def __init__(self, shop: Workshop, each: bool):
        self.shop, self.each = shop, each

    def checked(self, checks: dict[str, list[dict[str, bool]]]) -> tuple[list[dict[str, bool]], str]:
        """Chooses among the specialists' checked answers.

        Args:
            checks: Specialist to what is right about each answer.

        Returns:
            What is right about the chosen answers, and who was chosen.
        """
        if self.each:
            return [max(own, key=_first) for own in zip(*checks.values(), strict=True)], "the best for each question"
        best = max(checks, key=lambda name: sum(map(_first, checks[name])))
        return checks[best], best

    def losses(self, name: str, rows: list[dict]) -> list[tuple[float, int]]:
        """Returns the losses of the specialist with the least, or the least for each row."""
        found = {n: self.shop.specialist(n).losses(name, rows) for n in self.shop.names}
        if self.each:
            return [min(own) for own in zip(*found.values(), strict=True)]
        return min(found.values(), key=lambda pairs: sum(loss for loss, _ in pairs))

    def seconds(self) -> float:
        """Counts nothing: specialists count what they took."""
        return 0.0


def _first(check: dict[str, bool]) -> bool:
    return next(iter(check.values()))
