"""YAML that others wrote: plain values of limited size, or a sentence that names the file."""

from pathlib import Path

import yaml

from modeling_ultrafuser.files_ultrafuser import UnreadableFileError, check_file
from modeling_ultrafuser.refusals_ultrafuser import UnavailableError


MOST_BYTES = 1 << 20
MOST_NESTED = 32


class _PlainLoader(yaml.SafeLoader):
    """Without aliases, which can say in a line what fills the memory, and without keys that come twice."""

    depth = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*), which is not taken here: write the value out")
        self.depth += 1
        if self.depth > MOST_NESTED:
            raise yaml.YAMLError(f"it is nested in more than {MOST_NESTED} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str):
                raise yaml.YAMLError(f"its keys must be words, but one is {str(key)[:100]!r}")
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.YAMLError(f"it says {twice!r} twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path):
    """Reads a YAML file.

    Raises:
        UnreadableFileError: If it is no YAML, too large, or more than plain values under keys that come once.
        OSError: If it is not there.
    """
    if not Path(path).exists():
        raise UnavailableError(f"there is no file {str(path)!r}", "A recipe is a YAML file", "Check the spelling.")
    check_file(path, MOST_BYTES)
    return parse_yaml(Path(path).read_bytes(), path)


def parse_yaml(text: str | bytes, path: str | Path):
    """The same of a text that a file holds."""
    try:
        return yaml.load(text, _PlainLoader)  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        fact = f"{str(path)!r} cannot be read as YAML: {said[:300]}"
        raise UnreadableFileError(fact, "It must hold YAML", "Correct it.") from error
