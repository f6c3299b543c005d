"""An input that is rejected, in four parts, so that whoever catches the error need not read its sentence."""


class Refusal(ValueError):
    """An input that is rejected. Its text is the fact, the rule and the way out, in this order.

    Attributes:
        fact: What is wrong, naming the input. A clause without a full stop.
        rule: The rule that it breaks, and the reason of the rule. A clause without a full stop.
        way_out: What to do about it. One or more sentences.
        about: What the input is, in a word: "model", "weights", "tokenizer".
    """

    def __init__(self, fact: str, rule: str, way_out: str, *, about: str = "model"):
        super().__init__(fact, rule, way_out)
        self.fact, self.rule, self.way_out, self.about = fact, rule, way_out, about

    @property
    def problem(self) -> str:
        """The fact and the rule, in sentences."""
        return " ".join(f"{part[:1].upper()}{part[1:]}." for part in (self.fact, self.rule) if part)

    def __str__(self) -> str:
        return f"{self.problem} {self.way_out}".rstrip()


class UnavailableError(Refusal, FileNotFoundError):
    """Something that cannot be read at all: it is not there, or may not be read."""


class MissingPackageError(Refusal, ImportError):
    """Something that only a package reads that is not installed."""
