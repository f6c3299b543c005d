"""Derives what the ingredients' licences mean for a fused model. A first look, no legal advice."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError

from modeling_ultrafuser.files_ultrafuser import check_file

from .compat import yaml_of_card
from .yaml_files import MOST_BYTES, parse_yaml


# what asks for no more than attribution, by the Hub's identifiers
PERMISSIVE = {
    *("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "isc", "zlib", "ncsa"),
    *("cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc0-1.0", "unlicense", "wtfpl", "afl-3.0", "ecl-2.0"),
    *("cdla-permissive-1.0", "cdla-permissive-2.0", "ms-pl", "pddl", "postgresql", "artistic-2.0", "bsl-1.0"),
}
# all that match a licence's identifier or name say what it asks for: cc-by-nc-nd asks for two things
DEMANDS = {
    r"(^|[-_ .])nc([-_ .]|$)|non[-_ ]?commercial|research": "allows no commercial use, and neither does the whole then",
    r"(^|[-_ .])nd([-_ .]|$)": "allows no derived works, and a fused model is one",
    r"(^|[-_ .])sa([-_ .]|$)|gpl|share[-_ ]?alike|^mpl|^osl|^epl|^eupl": (
        "asks that what is made of it is shared under the same licence, which the others may not allow"
    ),
    r"llama|gemma|rail|qwen|tongyi|deepseek|bigscience|bigcode|^other$|^apple": (
        "has terms of its own, on use, naming or passing on, which bind the whole: read them"
    ),
}


@dataclass
class Ingredient:
    """A specialist, and what its own card says.

    Attributes:
        name: Of the specialist.
        model: Its id on the Hub; None for a local folder, or if nobody said.
        licence: By the Hub's identifier; None if its card states none, or could not be read.
        terms: The name of a licence that the Hub has no identifier for.
        link: Where those terms are.
        problem: Why nothing is known, if so.
    """

    name: str
    model: str | None = None
    licence: str | None = None
    terms: str | None = None
    link: str | None = None
    problem: str | None = None

    @property
    def stated(self) -> str:
        """The licence in a word."""
        return (self.terms if self.licence == "other" and self.terms else self.licence) or "unknown"


def read_ingredient(name: str, source: str | None) -> Ingredient:
    """Reads a specialist's card: in its folder, or on the Hub, from the cache when offline.

    Args:
        name: Of the specialist.
        source: Folder or id on the Hub; None if it is not known, because a fused folder does not record it.

    Raises:
        ValueError: If the source is neither.
    """
    if source is None:
        return Ingredient(name, problem="nobody said which model it is")
    if os.path.isdir(source):
        card, model = Path(source) / "README.md", None
        if not card.exists():
            return Ingredient(name, problem="its folder holds no README.md")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        model = source
        try:
            card = hf_hub_download(source, "README.md")
        except RemoteEntryNotFoundError:
            return Ingredient(name, model, problem="its repository holds no README.md")
        except OSError as error:
            return Ingredient(name, model, problem=f"its card could not be read from the Hub ({type(error).__name__})")
    else:
        raise ValueError(
            f"A specialist's source is a folder or an id such as 'owner/model', but that of {name!r} is {source!r}, "
            f"which is neither."
        )
    try:
        check_file(card, MOST_BYTES)
        block = yaml_of_card(Path(card).read_text(encoding="utf-8"))
        data = {} if block is None else parse_yaml(block, card)
        if not isinstance(data or {}, dict):
            raise ValueError(f"it is a {type(data).__name__}")
    except ValueError:
        # its own words would bring a path of this machine into a card
        return Ingredient(name, model, problem="the metadata of its card is malformed: it is no YAML mapping")
    licence, *more = ((data or {}).get(field) for field in ("license", "license_name", "license_link"))
    if licence is None:
        return Ingredient(name, model, problem="its card states no licence")
    licence = ", ".join(map(str, licence)) if isinstance(licence, list) else str(licence)
    return Ingredient(name, model, licence, *(None if text is None else str(text) for text in more))


def common_licence(ingredients: list[Ingredient]) -> dict[str, str]:
    """The licence of the whole, as metadata of a card: the one that all share, or "other", or "unknown"."""
    if any(i.licence is None for i in ingredients):
        return {"license": "unknown"}
    if len({(i.licence, i.terms) for i in ingredients}) > 1:
        return {"license": "other", "license_name": "those-of-all-specialists"}
    first = ingredients[0]
    named = {"license_name": first.terms, "license_link": first.link}
    return {"license": first.licence} | {key: value for key, value in named.items() if value}


def warnings(ingredients: list[Ingredient]) -> list[str]:
    """Lists obstacles to distributing the whole, in sentences."""
    found = []
    for i in ingredients:
        if i.problem:
            found.append(
                f"The licence of `{i.name}` is unknown: {i.problem}. Find out first: without a licence, only its owner "
                f"may pass it on."
            )
        elif demand := _demand(i):
            found.append(f"The licence of `{i.name}`, {i.stated}, {demand}.")
    stated = [i for i in ingredients if i.licence]
    if len({i.stated for i in stated}) > 1:
        each = ", ".join(f"{i.stated} (`{i.name}`)" for i in stated)
        found.append(f"The specialists' licences differ: {each}. The whole is bound by each of them.")
    return found


def _demand(ingredient: Ingredient) -> str | None:
    if ingredient.licence in PERMISSIVE:
        return None
    words = ingredient.licence.lower(), (ingredient.terms or "").lower()
    found = [demand for pattern, demand in DEMANDS.items() if any(re.search(pattern, word) for word in words)]
    return "; it ".join(found) or "is none that is known here to be permissive: read it"
