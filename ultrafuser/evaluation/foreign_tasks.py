"""Tasks of lm-eval that others wrote: what they may hold, and where their templates are rendered."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import jinja2
import lm_eval.utils
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from modeling_ultrafuser.files_ultrafuser import check_file
from trainers.template_sandbox import render_task

from ..yaml_files import MOST_BYTES, MOST_NESTED, parse_yaml
from . import local_tasks


# of a task, under which regular expressions stand
PATTERNS = ("regex_pattern", "regexes_to_ignore")


def are_strange(folder: Path) -> bool:
    """Returns whether tasks are not those that `local_tasks.write` wrote; rejects those that name functions, which are code."""
    strange = False
    for file in sorted(p for p in folder.rglob("*") if p.suffix in (".yaml", ".yml") and not p.is_dir()):
        check_file(file, MOST_BYTES)
        text = file.read_bytes().decode("utf-8", "replace")
        if local_tasks.wrote(file, text):
            continue
        strange = True
        try:
            foreign = [tag for tag in _tags(text) if not tag.startswith("tag:yaml.org,2002:")]
            content = None if foreign else parse_yaml(text, file)
            names = list(_values(content, "include"))
        except yaml.YAMLError as error:
            raise ValueError(f"Tasks are YAML files, but {str(file)!r} cannot be read as one: {error}") from error
        # what is included is read as well, whatever its name
        foreign += [
            f"include: {name}" for name in names if not (file.parent / name).is_file() or not name.endswith(".yaml")
        ]
        patterns = [value for key in PATTERNS for value in _values(content, key)]
        if patterns and not foreign:
            raise ValueError(
                f"A pattern can be written so that matching an answer takes for ever, so those of strangers are not tried "
                f"unasked, but {str(file)!r} has {patterns[0][:200]!r}. Read it; then --trust-remote-code "
                f"(`trust_remote_code=True`) uses it."
            )
        if foreign:
            raise ValueError(
                f"Functions that tasks name are code, which is not run unasked, but {str(file)!r} has {foreign[0]!r}. "
                f"Read it; then --trust-remote-code (`trust_remote_code=True`) runs it."
            )
    return strange


def _tags(text: str) -> Iterator[str]:
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_NESTED:
            raise yaml.YAMLError(f"it is nested in more than {MOST_NESTED} levels")
        if tag := getattr(event, "tag", None):
            yield tag


def _values(content, key: str) -> Iterator[str]:
    """Yields the values of a key at any depth."""
    if isinstance(content, dict):
        yield from ([str(content[key])] if key in content else [])
        content = list(content.values())
    for inside in content if isinstance(content, list) else ():
        yield from _values(inside, key)


def sandboxed(environment: jinja2.Environment) -> ImmutableSandboxedEnvironment:
    """Renders lm-eval's tasks with the same templates in a sandbox."""
    safe = ImmutableSandboxedEnvironment(
        loader=environment.loader,
        undefined=environment.undefined,
        keep_trailing_newline=environment.keep_trailing_newline,
    )
    safe.filters.update(environment.filters)
    return safe


LM_EVAL_JINJA = lm_eval.utils.env


class Elsewhere:
    """Stands for lm-eval's Jinja: what it compiles is rendered by another process, within limits."""

    def from_string(self, template: str) -> SimpleNamespace:
        return SimpleNamespace(render=lambda **row: render_task(template, row))


@contextmanager
def names_task(task: object, strange: bool) -> Iterator[None]:
    """Says in a sentence what fails in tasks that others wrote; what is wrong with lm-eval's own stays a fault."""
    try:
        yield
    except Exception as error:
        if not strange or (isinstance(error, OSError) and not isinstance(error, FileNotFoundError)):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(".")
        raise ValueError(
            f"A task says what is asked and how it is scored, but {str(task)[:200]!r} cannot be run by lm-eval: {reason}. "
            f"Correct its file."
        ) from error
