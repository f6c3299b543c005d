"""Reading what a model wrote, which is seldom quite what it was asked for."""

import json
import re


def read_items(text: str) -> list[str]:
    """The strings of a list that a model wrote: as JSON, with whatever around it, maybe cut off before its end."""
    for start in re.finditer(r"[\[{]", text):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, start.start())
        except ValueError:
            continue
        if isinstance(value, dict):
            value = next((v for v in value.values() if isinstance(v, list)), [])
        if items := [item for item in map(_item, value) if item]:
            return items
    # what is whole of a list that was cut off
    strings = r'"(?:[^"\\]|\\.)*"'
    begun = re.search(rf"\[\s*({strings}(?:\s*,\s*{strings})*)", text)
    found = re.findall(strings, begun[1]) if begun else []
    return [item for item in map(_loaded, found) if item]


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
    return text.encode("utf-8", "replace").decode().strip()
