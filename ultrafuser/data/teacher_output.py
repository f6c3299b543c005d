"""Reading what a model wrote, which is seldom quite what it was asked for."""

import json
import re

from ..openai_client import text_of


LONGEST = 400_000  # characters that are searched for a list
LONGEST_ITEM = 20_000  # of a list, in characters
SCANS = 8  # of so many characters as there are, at most: brackets without end must not take long


def read_items(text: str) -> list[str]:
    """The strings of a list that a model wrote: as JSON, with whatever around it, maybe cut off before its end."""
    text = text[:LONGEST]
    left = SCANS * len(text)
    for start in re.finditer(r"[\[{]", text):
        if left < 0:
            break
        try:
            value, _ = json.JSONDecoder().raw_decode(text, start.start())
        except json.JSONDecodeError as error:
            # the error counts the lines before it
            left -= error.pos - start.start() + error.pos // 64 + 1
            continue
        # brackets too deep, numbers too long
        except (RecursionError, ValueError):
            left -= len(text)
            continue
        if isinstance(value, dict):
            value = next((v for v in value.values() if isinstance(v, list)), [])
        if items := [item for item in map(_item, value) if 0 < len(item) <= LONGEST_ITEM]:
            return items
    # what is whole of a list that was cut off
    strings = r'"(?:[^"\\]|\\.)*"'
    begun = re.search(rf"\[\s*({strings}(?:\s*,\s*{strings})*)", text)
    found = re.findall(strings, begun[1]) if begun else []
    return [item for item in map(_loaded, found) if 0 < len(item) <= LONGEST_ITEM]


def _item(value) -> str:
    # some list objects: {"name": ..., "description": ...}
    parts = value.values() if isinstance(value, dict) else [value]
    return writable(": ".join(part for part in parts if isinstance(part, str)))


def _loaded(string: str) -> str:
    try:
        return writable(json.loads(string, strict=False))
    except ValueError:
        return ""


def writable(text: str) -> str:
    """The text without blanks around it, and with nothing in it that UTF-8 cannot hold: half a surrogate pair."""
    return text_of(text).strip()
