"""Arguments and options that several commands share, and how NAME=VALUE is read."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option


Folder = Annotated[Path, Argument(help="Folder of a fused model.")]
Model = Annotated[str, Argument(help="Folder of a fused model, or its id on the Hub.")]
SpecialistName = Annotated[str, Argument(help="Name of the specialist.")]
Out = Annotated[Path, Option(help="Folder to write; it must be empty or not exist.")]
Base = Annotated[str | None, Option(help="Base of the adapters, if it is not where they say.")]
SignedWeights = Annotated[
    str | None,
    Option(help="NAME=NUMBER,NAME=NUMBER, of either sign: the gate's scores are added to them, not made shares."),
]
TrustRemoteCode = Annotated[
    bool, Option("--trust-remote-code", help="Run code that comes with the model's or tokenizer's folder.")
]
HeldOutData = Annotated[list[str], Option(help="DOMAIN=FILE.jsonl or DOMAIN=HUB_ID:SPLIT, once per domain.")]
Examples = Annotated[int, Option(min=1, help="Most examples of each domain.")]
MaxLength = Annotated[int, Option(min=2, help="Longer examples are cut, in tokens.")]
PromptTokens = Annotated[
    int, Option(min=1, help="First tokens of plain text, which routers read and nobody is scored on.")
]
Json = Annotated[bool, Option("--json", help="Everything in JSON, for programs.")]


def named(texts: list[str] | None, what: str) -> dict[str, str]:
    """Reads NAME=VALUE arguments into a dict.

    Args:
        texts: The arguments.
        what: Name of the option, for the error.

    Raises:
        typer.BadParameter: If one is of another form, or two have one name.
    """
    pairs = [text.partition("=") for text in texts or []]
    for text, (name, _, value) in zip(texts or [], pairs, strict=True):
        if not name or not value:
            way = "Neither part may be empty." if "=" in text else f"Put a name of your choice before it: NAME={text}."
            raise typer.BadParameter(f"{what} must be NAME=VALUE, but got {text!r}. {way}")
    names = [name for name, _, _ in pairs]
    if len(set(names)) < len(names):
        raise typer.BadParameter(f"{what} must have a name each, but the names are {names}. Give each another one.")
    return {name: value for name, _, value in pairs}


def numbers(text: str | None, what: str) -> dict[str, float] | None:
    """Reads NAME=NUMBER,NAME=NUMBER into a dict.

    Raises:
        typer.BadParameter: As `named`, or if one is no number.
    """
    if text is None:
        return None
    found = named(text.split(","), what)
    try:
        return {name: float(value) for name, value in found.items()}
    except ValueError:
        raise typer.BadParameter(f"{what} must be NAME=NUMBER,NAME=NUMBER, but got {text!r}.") from None


def loading_code(out: Path | str, revision: str | None = None) -> str:
    """Returns the Python that loads a fused folder or repository and its tokenizer."""
    of = f'"{out}", revision="{revision}"' if revision else f'"{out}"'
    return "\n".join(
        f"{variable} = {auto}.from_pretrained({of}, trust_remote_code=True)"
        for variable, auto in (("model", "AutoModelForCausalLM"), ("tokenizer", "AutoTokenizer"))
    )
