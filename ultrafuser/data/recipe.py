"""Reads a recipe: the data to make, with which teacher, at what cost; one YAML file, checked before anything is sent."""

import difflib
from functools import partial
from math import comb
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trainers.template_sandbox import RenderingError, placeholders

from ..keys import api_key, check_address, check_no_secrets
from ..yaml_files import read_yaml


PROMPTS = Path(__file__).parent / "prompts"
# a prompt may use all of these; without the ones named here a step would ask the same of every row
PLACEHOLDERS = (
    *("domain", "description", "number", "known", "topic", "subtopic", "instruction", "skills", "conversation"),
)
NEEDED = {
    "meta_topics": ("description", "number"),
    "sub_topics": ("topic", "number"),
    "instructions": ("subtopic", "number"),
    "strong": ("instruction", "number"),
    "weak": ("instruction", "number"),
    "skills": ("description", "number"),
    "pairs": ("skills",),
    "harder": ("instruction",),
    "answers": (),
    "turns": ("conversation",),
}

# what else is written beside the domains' files
RESERVED = frozenset(("journal", "steps", "unfinished", "dataset", "report", "cache"))
LONGEST_NAME = 100  # bytes
# each list is in the requests that make it longer
MOST_IN_A_LIST = 10_000

Count = Annotated[int, Field(ge=0, le=10**7)]
Positive = Annotated[int, Field(ge=1, le=10**7)]
Amount = Annotated[float, Field(gt=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Teacher(_Part):
    """A model behind an OpenAI-compatible server, what it costs and how fast it may be asked."""

    base_url: Annotated[str, AfterValidator(check_address)]
    """Address up to and including `/v1`."""
    model: str
    """The name under which the server knows it."""
    api_key_variable: str | None = None
    """Environment variable that holds the API key. None sends none. `data make` asks before it takes a recipe's word."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Temperature of sampling."""
    max_tokens: Positive | None = 2048
    """Most tokens of a reply. None sends no limit, for servers that call it by another name (see `parameters`)."""
    parameters: Annotated[dict, AfterValidator(partial(check_no_secrets, what="Parameters"))] = {}
    """More fields of each request, as the server calls them."""
    structured: Literal["json_schema", "json_object", "none"] = "json_schema"
    """How lists are asked for: by a schema that the server enforces, as any JSON, or by the prompt alone."""
    price_in: Annotated[float, Field(ge=0)] = 0.0
    """Money per million prompt tokens."""
    price_out: Annotated[float, Field(ge=0)] = 0.0
    """Money per million reply tokens."""
    requests_per_minute: Amount | None = None
    """What the server allows. None sets no limit."""
    tokens_per_minute: Amount | None = None
    """What the server allows, prompt and reply together. None sets no limit."""
    concurrency: Positive = 32
    """Requests under way at once."""
    tokens_per_second: Amount = 50.0
    """Speed of one reply, only to foresee how long everything takes."""
    timeout: Amount = 300.0
    """Of one try, in seconds."""
    retries: Count = 8
    """Of a request that met a rate limit, a server error, a time-out or a lost connection."""

    def api_key(self) -> str:
        """The API key, from the environment.

        Raises:
            ValueError: If the variable is not set, or its key is not for this server.
        """
        return api_key(self.base_url, self.api_key_variable, "name another with --key-variable")


class Budget(_Part):
    """Limits on the cost of the whole set, all runs together.

    Nothing is sent whose longest reply could go beyond, so that only a prompt of more tokens than foreseen, or a
    teacher without `max_tokens`, can.
    """

    tokens: Annotated[int, Field(ge=1)] | None = None
    """Of prompts and replies together."""
    money: Amount | None = None
    """In the unit of the teacher's prices."""


class Skills(_Part):
    """Instructions that need two skills at once, or more (Instruct-SkillMix, https://arxiv.org/abs/2408.14774)."""

    number: Annotated[int, Field(ge=2)]
    """Length of the domain's list of skills."""
    together: Annotated[int, Field(ge=2, le=5)] = 2
    """Number of skills that an instruction needs."""
    pairs: Count = 0
    """Instructions for two skills of this domain, or as many as `together` says."""
    across: Count = 0
    """Instructions whose last skill is one of another domain."""


class Domain(_Part):
    """Instructions and answers to make for one domain."""

    description: str
    """What the domain is about, for the teacher."""
    meta_topics: Positive
    """Topics."""
    sub_topics: Positive
    """Sub-topics of all topics together."""
    instructions: Positive
    """Conversations about the sub-topics, expansion included; those for skills together come on top."""
    strong: Count = 0
    """Strongly related instructions that each first one is expanded by."""
    weak: Count = 0
    """Weakly related instructions that each first one is expanded by."""
    harder: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of all instructions that are rewritten to be harder."""
    turns: Positive = 1
    """Questions in each conversation; all but the first come from a simulated user."""
    skills: Skills | None = None
    """Instructions for skills together, or none."""
    instruction_tokens: Positive = 60
    """Typical length of an instruction, to foresee the cost."""
    answer_tokens: Positive = 400
    """Typical length of an answer, to foresee the cost."""

    @model_validator(mode="after")
    def _counts_grow(self):
        if not self.meta_topics <= self.sub_topics <= self.instructions:
            raise ValueError(
                f"Every topic has a sub-topic and every sub-topic an instruction, but meta_topics={self.meta_topics}, "
                f"sub_topics={self.sub_topics} and instructions={self.instructions}. Let them grow in this order."
            )
        longest = max(
            self.meta_topics,
            self.sub_topics // self.meta_topics,
            self.instructions // self.sub_topics,
            *(self.strong, self.weak, self.turns, self.skills.number if self.skills else 0),
        )
        if longest > MOST_IN_A_LIST:
            raise ValueError(
                f"A list is made by requests that hold what it has so far, so it has at most {MOST_IN_A_LIST:,} items, but "
                f"one of a domain would have {longest:,}. Ask for more sub-topics, or for less."
            )
        return self


class Recipe(_Part):
    """Everything that a set is made from."""

    source: str
    """Written into every record: what made it."""
    licence: str
    """Written into every record: what its use is bound to, such as the terms of the teacher's provider."""
    teacher: Teacher
    domains: Annotated[dict[str, Domain], Field(min_length=1)]
    budget: Budget = Budget()
    seed: int = 0
    """Of what is drawn: which instructions become harder and which skills meet."""
    items_per_request: Positive = 20
    """Most topics, skills or instructions that one request asks for."""
    more_rounds: Count = 2
    """How often what is missing, for being malformed or a repetition, is asked for again."""
    keep_cut_off: bool = False
    """Keep answers that end because they reached `max_tokens`."""
    prompts: Path | None = None
    """Folder whose files replace the prompts of the same name. Relative to the recipe."""

    @field_validator("domains")
    @classmethod
    def _names_are_file_names(cls, domains: dict) -> dict:
        for name in domains:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(
                    f"A domain's name is a file's name too: letters, digits, - and _. It is {name!r}. Rename it."
                )
            if len(name.encode()) > LONGEST_NAME:
                raise ValueError(
                    f"A domain's name is a file's name too, of {LONGEST_NAME} bytes at most, but {name[:20]!r}... has "
                    f"{len(name.encode())}. Rename it."
                )
            if name.casefold() in RESERVED:
                raise ValueError(
                    f"Files of the made set have the names {sorted(RESERVED)}, so no domain has, but one is {name!r}. "
                    f"Rename it."
                )
        alike = {name.casefold(): name for name in domains}
        if twice := [name for name in domains if alike[name.casefold()] != name]:
            raise ValueError(
                f"Domains are files, and some disks tell no capital letter from a small one, but {twice[0]!r} and "
                f"{alike[twice[0].casefold()]!r} are both there. Rename one."
            )
        return domains

    @model_validator(mode="after")
    def _pairs_can_be_made(self):
        with_skills = {name: domain.skills for name, domain in self.domains.items() if domain.skills}
        for name, skills in with_skills.items():
            others = sum(other.number for n, other in with_skills.items() if n != name)
            for field, pairs, most in (
                ("pairs", skills.pairs, comb(skills.number, skills.together)),
                ("across", skills.across, comb(skills.number, skills.together - 1) * others),
            ):
                if pairs > most:
                    raise ValueError(
                        f"No skills are asked for together twice, so domains.{name}.skills.{field} is at most {most} with "
                        f"these numbers of skills, but is {pairs}. Lower it, or raise `skills.number` of a domain."
                    )
        return self


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe and checks everything that can be checked without the teacher.

    Raises:
        FileNotFoundError: If the file, or the folder of prompts that it names, is not there.
        ValueError: With every mistake, by the name of its place.
    """
    path = Path(path)
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"A recipe is a YAML file of keys and values, but {str(path)!r} is {str(content)[:100]!r}.")
    if isinstance(content.get("prompts"), str):
        content["prompts"] = path.parent / content["prompts"]
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        mistakes = "\n".join(f"- {_in_words(mistake)}" for mistake in error.errors())
        raise ValueError(f"{str(path)!r} is not a recipe that can be followed:\n{mistakes}") from error
    load_prompts(recipe.prompts)
    return recipe


def _in_words(mistake: dict) -> str:
    place = ".".join(map(str, mistake["loc"]))
    if mistake["type"] == "extra_forbidden":
        known = list(_fields_at(mistake["loc"][:-1]))
        close = difflib.get_close_matches(str(mistake["loc"][-1]), known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known there: {', '.join(known)}."
        return f"{place}: unknown key. {hint}"
    if mistake["type"] == "missing":
        return f"{place}: missing."
    if mistake["type"] == "value_error":
        return f"{place}: {mistake['ctx']['error']}".removeprefix(": ")
    return f"{place}: {mistake['msg']}, but it is {mistake['input']!r}."


def _fields_at(place: tuple) -> dict:
    part = {"teacher": Teacher, "budget": Budget, "domains": Domain}[place[0]] if place else Recipe
    return (Skills if place[-1:] == ("skills",) else part).model_fields


def load_prompts(folder: Path | None = None) -> dict[str, str]:
    """Templates of all prompts by step: those in `folder`, and for the others the package's own.

    Raises:
        FileNotFoundError: If the folder is not there.
        ValueError: If a file is not the prompt of a step, is no valid template, uses a placeholder that nobody fills,
            or lacks one without which all its requests would be alike.
    """
    own = {}
    if folder is not None:
        if not folder.is_dir():
            raise FileNotFoundError(f"`prompts` names a folder with prompts, but {str(folder)!r} is not there.")
        own = {file.stem: file for file in sorted(folder.glob("*.md"))}
        if unknown := sorted(set(own) - set(NEEDED)):
            raise ValueError(
                f"A prompt has the name of its step, one of {list(NEEDED)}, but {str(folder)!r} holds "
                f"{[f'{name}.md' for name in unknown]}. Rename or remove what is not a prompt."
            )
    return {step: _template(step, own.get(step, PROMPTS / f"{step}.md")) for step in NEEDED}


def _template(step: str, file: Path) -> str:
    text = file.read_text(encoding="utf-8")
    try:
        used = placeholders(text)
    except RenderingError as error:
        where = f" line {error.line}" if error.line else ""
        raise ValueError(f"Prompts are Jinja templates, but {str(file)!r}{where}: {error}.") from error
    for name in sorted(used - set(PLACEHOLDERS)):
        close = difflib.get_close_matches(name, PLACEHOLDERS, n=1)
        hint = f"Did you mean {{{{ {close[0]} }}}}?" if close else f"There are {list(PLACEHOLDERS)}."
        raise ValueError(f"Nothing fills {{{{ {name} }}}} in {str(file)!r}. {hint}")
    for name in NEEDED[step]:
        if name not in used:
            raise ValueError(
                f"Without {{{{ {name} }}}} the prompt of step {step!r} would not say what is asked for, but "
                f"{str(file)!r} lacks it. Put it in."
            )
    return text
