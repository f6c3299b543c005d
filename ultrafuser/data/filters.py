"""Filters that look at one record at a time: each says why a record is dropped, or None.

They judge what the assistant says, for that is what is trained on: a user may well show broken code or a wrong sum.
"""

import ast
import functools
import importlib.util
import re
import textwrap
import warnings


FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^\n]*\n(.*?)(?:^[ \t]*\2[`~]*[ \t]*$|\Z)", re.M | re.S)
PYTHON = {"python", "python3", "py", "py3"}

# a refusal stands at the beginning, and says that it is one
_CANNOT = (
    r"(?:can(?:'t|not| not)|could(?:n't| not)|won't|will not|am unable|'m unable|am not able|'m not able|must decline)"
)
_SORRY = (
    r"(?:i'm |i am |we're |we are )?(?:really |very |so )?sorry|i apologi[sz]e|my apologies|unfortunately|regrettably"
)
_HELP = (
    r"(?:help|assist|provide|fulfil|fulfill|comply|answer|generate|create|write|engage|support|share|discuss|do that|"
    r"continue|respond|participate|offer|complete)"
)
REFUSAL = re.compile(
    rf"(?:{_SORRY})[^.!?\n]{{0,40}}?\bi(?: {_CANNOT}|{_CANNOT}| do(?:n't| not) have (?:access|the ability))"
    rf"|i(?: {_CANNOT}|{_CANNOT})(?: to)?(?: \w+)? {_HELP}\b"
    rf"|as an? (?:ai|artificial intelligence|(?:large )?language model|assistant)\b[^.!?\n]{{0,60}}?"
    rf"\bi(?: {_CANNOT}|{_CANNOT}| do(?:n't| not)|'m not| am not)"
)


def answers(record: dict) -> list[str]:
    """Returns the assistant's messages, turn by turn."""
    return [m["content"] for m in record["messages"] if m["role"] == "assistant"]


def without_code(text: str) -> str:
    """The text without its fenced blocks."""
    return FENCE.sub("\n", text)


def wrong_length(record: dict, shortest: int = 20, longest: int = 40_000) -> str | None:
    """A message without words, no answer at the end, or too few or too many characters altogether."""
    for i, message in enumerate(record["messages"]):
        if not message["content"].strip():
            return f"message {i} ({message['role']}) is empty"
    if record["messages"][-1]["role"] != "assistant":
        return f"the last message is the {record['messages'][-1]['role']}'s, not the assistant's"
    length = sum(len(m["content"]) for m in record["messages"])
    if not shortest <= length <= longest:
        return f"{length} characters, outside of {shortest} to {longest}"
    return None


def wrong_language(record: dict, languages: tuple[str, ...] = ("en",), confidence: float = 0.8) -> str | None:
    """Answers that are surely in another language: by py3langid, which ships its model and needs no network.

    Code and formulas are in no language: fenced blocks do not count, what holds few words is not judged, and neither
    is what the model is not sure of.

    Args:
        record: The record.
        languages: ISO 639-1 codes of those that are welcome.
        confidence: Probability from which on the model is believed.
    """
    text = without_code("\n".join(answers(record)))[:2000]
    if sum(map(str.isalpha, text)) < 20:
        return None
    language, probability = _identifier().classify(text)
    if language in languages or probability < confidence:
        return None
    return f"language {language!r} with probability {probability:.2f}: {_shortened(text)}"


def need_language_model() -> None:
    """Raises ImportError where languages cannot be told, so that this is known before any record is read."""
    if importlib.util.find_spec("py3langid") is None:
        raise ImportError(
            "Languages are told by py3langid, which is not installed: pip install py3langid. Or leave the filter out: "
            "skip 'language'."
        )


@functools.cache
def _identifier():
    # loading takes a second and 120 MB, so only where it is used
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def refusal(record: dict) -> str | None:
    """An answer that begins by refusing."""
    for answer in answers(record):
        beginning = " ".join(answer[:300].replace("’", "'").lower().split())
        if REFUSAL.match(beginning):
            return _shortened(answer)
    return None


def broken_code(record: dict) -> str | None:
    """A block fenced as Python that does not parse, or that never ends. Other languages are not looked at.

    Lines of a notebook (`%magic`, `!command`) and sessions (`>>>`) are no Python, and no fault either.
    """
    for answer in answers(record):
        if "```" not in answer and "~~~" not in answer:
            continue
        for block in FENCE.finditer(answer):
            if block[3].lower() in PYTHON and (why := _does_not_parse(block[4])):
                return why
            if block[3].lower() in PYTHON and not block[0].rstrip().endswith(block[2]):
                return f"the block that begins with {_shortened(block[4])} never ends"
    return None


def _does_not_parse(source: str) -> str | None:
    lines = textwrap.dedent(source).splitlines()
    if any(line.lstrip().startswith(">>>") for line in lines):
        return None
    lines = ["pass" if line[:1] in ("%", "!") else line for line in lines]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # a notebook awaits at the top level
            flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
            compile("\n".join(lines), "<block>", "exec", flags=flags, dont_inherit=True)
    except SyntaxError as error:
        line = lines[error.lineno - 1] if error.lineno and error.lineno <= len(lines) else ""
        return f"{error.msg}, line {error.lineno}: {_shortened(line)}"
    except (ValueError, RecursionError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _shortened(text: str, length: int = 120) -> str:
    return repr(textwrap.shorten(text, length, placeholder=" ..."))
