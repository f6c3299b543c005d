"""Wrong arithmetic: equalities in prose that can be checked, checked.

What is found in a text is never evaluated as code: a small grammar reads it, bounds its size, and computes with exact
fractions, and with SymPy where there are letters. Whatever the grammar does not surely understand is not judged.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

from sympy import QQ, ring
from sympy.polys.rings import PolyElement

from .filters import answers, without_code


NUMBER = r"\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+(?:\.\d+)?"
TOKEN = re.compile(rf"(?P<number>{NUMBER})|(?P<letter>[a-zA-Z](?![\w']))|(?P<sign>\*\*|[-+*/^()=])|(?P<space>[ \t]+)")
UNREAD = re.compile(r"\w+|.")
WORD_BEFORE = re.compile(r"([\w\\']+)[ \t]*$")
BULLET = re.compile(r"^\s*(?:[-*+•–]|\(?\d+[.)]|#+)\s+", re.M)
# behind these a number is part of something that was not read, or the dash is no minus
NOT_BEHIND = re.compile(
    r".*[\d_\\].*|of|plus|minus|times|over|by|to|from|at|sqrt|root|log|ln|exp|sin|cos|tan|sec|csc|cot|mod|modulo|power|"
    r"squared|cubed|factorial|choose|base|sum|product|difference|quotient|ratio|half|step|part|case|example|question|"
    r"problem|chapter|section|equation|eq|line|day|week|month|year|page|figure|table|number|no|versus|vs",
    re.I,
)
NOT_BEFORE = re.compile(
    r"[ \t]*(?:remainder|rem|r|mod|modulo|percent|times|plus|minus|divided|squared|cubed|million|billion|thousand|hundred|dozen)\b",
    re.I,
)
# in such lines an equality need not hold, or not in these numbers
HYPOTHETICAL = re.compile(
    r"\b(?:about|around|approximately|approx|roughly|nearly|almost|wrong|incorrect|mistake|mistaken|false|error|not|"
    r"isn't|doesn't|never|instead|suppose|assume|if|whether|binary|hexadecimal|octal|base|modulo|mod|modular|modulus|"
    r"xor|boolean|congruent|clock)\b|[≈≠≡~?]",
    re.I,
)
# an equality with letters claims to hold for all of them only where one expression is rewritten
REWRITING = re.compile(r"\b(?:expand|factor|factori[sz]e|simplify|multiply out)", re.I)
SOLVING = re.compile(r"\b(?:solve|solution|equation|root|roots|let|given|where|when|find|for x|function)\b|'", re.I)
LATEX = (
    (r"\\(?:times|cdot|ast)(?![a-z])", "*"),
    (r"\\div(?![a-z])", "/"),
    (r"\\(?:left|right|displaystyle)(?![a-z])|\\[,;! ()\[\]]|[$`&]", " "),
    (r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}", r"((\1)/(\2))"),
    (r"\\boxed\{([^{}]*)\}", r"\1"),
    (r"\^\{([^{}]+)\}", r"^(\1)"),
    (r"[×·⋅∗]", "*"),
    (r"÷", "/"),
    (r"[−–]", "-"),
    (r"²", "^2"),
    (r"³", "^3"),
    (r"(?<=\d)[ \t]*x[ \t]*(?=\d)", "*"),
    # bold, and not a power
    (r"(?<!\S)\*\*(?=\S)|(?<=\S)\*\*(?=[\s.,;:!)]|$)", " "),
)
MOST_TOKENS, MOST_DEPTH, MOST_BITS, MOST_LETTERS, HIGHEST_DEGREE, MOST_TERMS = 60, 12, 4096, 3, 24, 500
LETTER = re.compile("[a-zA-Z]")
BARE = re.compile(rf"-?\s*(?:{NUMBER}|[a-zA-Z])")
RELATIVE = Fraction(1, 1000)


class NotUnderstood(ValueError):  # noqa: N818
    """The grammar does not read this, or it is too large."""


def wrong_arithmetic(record: dict) -> str | None:
    """An equality in an answer that does not hold.

    Between numbers every member of a chain is compared with the next, with what decimals round away allowed for: a
    unit of the last place of the one that stands alone, or a thousandth. With letters only where an expression is
    expanded, factored or simplified, since elsewhere an equality may be an equation to solve.
    """
    for answer in answers(record):
        if "=" not in answer:
            continue
        for paragraph in re.split(r"\n\s*\n", _plain(without_code(answer))):
            identities = bool(REWRITING.search(paragraph)) and not SOLVING.search(paragraph)
            for line in paragraph.splitlines():
                if "=" in line and not HYPOTHETICAL.search(line):
                    for members in chains(line):
                        if wrong := _wrong_pair(members, identities):
                            return f"{wrong[0]} = {wrong[1]}"
    return None


def _plain(text: str) -> str:
    text = BULLET.sub("", text)
    for pattern, replacement in LATEX:
        text = re.sub(pattern, replacement, text)
    return text


def chains(line: str) -> Iterator[list[str]]:
    """Members of every chain of equalities in a line that stands there complete, as they are written."""
    position = 0
    while position < len(line):
        start = position
        while match := TOKEN.match(line, position):
            position = match.end()
        run = line[start:position]
        if "=" in run and "==" not in run and _is_complete(line, run, start):
            yield [member.strip() for member in run.split("=") if member.strip()]
        # whatever ends a run is passed over as a whole: a word, a sign, a comma
        rest = UNREAD.match(line, position)
        position = rest.end() if rest else len(line)


def _is_complete(line: str, run: str, start: int) -> bool:
    """Returns whether the run is a whole expression, with nothing of it before or behind."""
    begin = start + len(run) - len(run.lstrip())
    before, behind = line[:begin], line[start + len(run.rstrip()) :]
    if re.match(r"[^\s.,;:)\]}\"'<>]|[.,:]\d", behind) or NOT_BEFORE.match(behind):
        return False
    if not before.strip() or line[begin] == "=":
        return True
    # "total - 3 + 4": the sign has a left side that is not read
    if line[begin] in "+-*/^" or (not before[-1].isspace() and before[-1] not in "([{\"'<>"):
        return False
    if word := WORD_BEFORE.search(before):
        return not NOT_BEHIND.fullmatch(word[1])
    return before.rstrip()[-1] in ".,:;!([{\"'<>→⇒)"


def _wrong_pair(members: list[str], identities: bool) -> tuple[str, str] | None:
    letters = sorted(set(LETTER.findall(" = ".join(members))))
    known = None
    for member in members:
        if letters and not identities and LETTER.search(member):
            continue
        try:
            value = parse(member, letters if identities else ())
        except NotUnderstood:
            known = None
            continue
        # "50 = 10" is the end and the beginning of something else
        if known and not (BARE.fullmatch(known[0]) and BARE.fullmatch(member)) and not _equal(*known, member, value):
            return known[0], member
        known = member, value
    return None


def _equal(left: str, a: Fraction | PolyElement, right: str, b: Fraction | PolyElement) -> bool:
    if a == b:
        return True
    if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
        # a value on one side, or other letters, is an equation
        return isinstance(a, Fraction) or isinstance(b, Fraction) or _letters(a) != _letters(b)
    if "." not in left + right:
        return False
    # the one that stands alone has been rounded, or cut off
    (text, rounded), exact = ((left, a), b) if BARE.fullmatch(left) else ((right, b), a)
    unit = Fraction(1, 10 ** len(text.partition(".")[2])) if BARE.fullmatch(text) and "." in text else 0
    slack = unit if abs(rounded) < abs(exact) else unit / 2
    return abs(a - b) <= max(slack, RELATIVE * max(abs(a), abs(b)))


def _letters(polynomial: PolyElement) -> list[bool]:
    return [degree > 0 for degree in polynomial.degrees()]


def parse(text: str, letters: Sequence[str] = ()) -> Fraction | PolyElement:
    """The value of an expression of numbers, letters, + - * / ^ and parentheses.

    Args:
        text: The expression.
        letters: Those of the polynomial ring to compute in.

    Returns:
        A polynomial, or a fraction if it is constant.

    Raises:
        NotUnderstood: If it is anything else, larger than the bounds above, or can be read in two ways.
    """
    tokens = [(m.lastgroup, m[0]) for m in TOKEN.finditer(text) if m.lastgroup != "space"]
    if "".join(token for _, token in tokens) != re.sub(r"[ \t]", "", text):
        raise NotUnderstood("other signs")
    if len(tokens) > MOST_TOKENS or len(letters) > MOST_LETTERS:
        raise NotUnderstood("too long")
    leaves = _leaves(tuple(letters))
    value = _sum(tokens, leaves, 0)
    if tokens:
        raise NotUnderstood("something is left over")
    if isinstance(value, PolyElement) and value.is_ground:
        constant = value.ring.domain.convert(value.coeff(1))
        value = Fraction(int(constant.numerator), int(constant.denominator))
    return value


@functools.lru_cache(maxsize=256)
def _leaves(letters: tuple[str, ...]) -> dict[str, object]:
    """States how a number is made, and what the letters are."""
    if not letters:
        return {"number": _fraction}
    polynomials, *generators = ring(letters, QQ)
    return {
        "number": lambda text: polynomials(QQ(*Fraction(text).as_integer_ratio())),
        **dict(zip(letters, generators, strict=True)),
    }


def _fraction(text: str) -> Fraction:
    # several times as fast for what most numbers are
    return Fraction(int(text)) if text.isdecimal() else Fraction(text)


# each takes what it reads from the front of the tokens


def _sum(tokens: list, leaves: dict, depth: int):
    if depth > MOST_DEPTH:
        raise NotUnderstood("too deep")
    value = _product(tokens, leaves, depth)
    while _next(tokens) in ("+", "-"):
        sign = tokens.pop(0)[1]
        term = _product(tokens, leaves, depth)
        value = value + term if sign == "+" else value - term
    return value


def _product(tokens: list, leaves: dict, depth: int):
    value, sign = _signed(tokens, leaves, depth), None
    while tokens:
        if _next(tokens) in ("*", "/"):
            sign = tokens.pop(0)[1]
            factor = _signed(tokens, leaves, depth)
        elif sign != "/" and (tokens[0][0] == "letter" or _next(tokens) == "("):
            factor = _power(tokens, leaves, depth)
        else:
            # behind a division, "1/2x" can be read in two ways
            break
        value = _divided(value, factor) if sign == "/" else value * factor
        _check_size(value)
    return value


def _divided(value, factor):
    if factor == 0 or not isinstance(factor, Fraction) and not factor.is_ground:
        raise NotUnderstood("divided by zero, or by letters")
    return value / factor if isinstance(factor, Fraction) else value.quo_ground(factor.coeff(1))


def _signed(tokens: list, leaves: dict, depth: int):
    if _next(tokens) not in ("+", "-"):
        return _power(tokens, leaves, depth)
    sign = tokens.pop(0)[1]
    if len(tokens) > 1 and tokens[1][1] in ("^", "**"):
        raise NotUnderstood("-3^2 can be read in two ways")
    value = _power(tokens, leaves, depth)
    return value if sign == "+" else -value


def _power(tokens: list, leaves: dict, depth: int):
    base = _atom(tokens, leaves, depth)
    if _next(tokens) not in ("^", "**"):
        return base
    tokens.pop(0)
    exponent = _exponent(tokens, depth)
    # the size is told before it is computed, not after
    if isinstance(base, Fraction):
        bits = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent)
        if bits > MOST_BITS or (base == 0 and exponent <= 0):
            raise NotUnderstood("too large, or no number")
    elif not 0 <= exponent <= HIGHEST_DEGREE // max(1, sum(base.degrees())):
        raise NotUnderstood("too high a power")
    return base**exponent


def _exponent(tokens: list, depth: int) -> int:
    # of numbers only, whatever the base is of
    exponent = _signed(tokens, {"number": _fraction}, depth + 1)
    if exponent.denominator != 1:
        raise NotUnderstood("a power that is no whole number")
    return int(exponent)


def _atom(tokens: list, leaves: dict, depth: int):
    if not tokens:
        raise NotUnderstood("it ends too early")
    kind, token = tokens.pop(0)
    if kind == "number":
        if len(token) > 50:
            raise NotUnderstood("too large")
        return leaves["number"](token.replace(",", ""))
    if kind == "letter" and token in leaves and _next(tokens) != "(":
        return leaves[token]
    if token == "(":
        value = _sum(tokens, leaves, depth + 1)
        if tokens and tokens.pop(0)[1] == ")":
            return value
    raise NotUnderstood(f"{token!r} does not belong there")


def _next(tokens: list) -> str | None:
    return tokens[0][1] if tokens else None


def _check_size(value) -> None:
    if isinstance(value, Fraction):
        fits = max(value.numerator.bit_length(), value.denominator.bit_length()) <= MOST_BITS
    else:
        fits = len(value) <= MOST_TERMS and sum(max(d, 0) for d in value.degrees()) <= HIGHEST_DEGREE
    if not fits:
        raise NotUnderstood("too large")
