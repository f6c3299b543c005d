"""Private parts of other libraries are used in four files alone, read from the source."""

import ast
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
COMPAT = {
    *("modeling_ultrafuser/compat_ultrafuser.py", "trainers/compat.py", "trainers/compat_distillation.py"),
    "ultrafuser/compat.py",
}
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate")
# public in spite of their names
PUBLIC = {"_replace", "_asdict", "_exit"}
# what a class tells transformers of itself, or is asked for by documented interfaces (`_info`, `_compute` of `evaluate`)
TOLD = {
    *("_init_weights", "_auto_class", "_tp_plan", "_can_compile_fullgraph", "_info", "_compute"),
    *("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend"),
    *("_skip_keys_device_placement", "_keep_in_fp32_modules_strict", "_VALID_DICT_FIELDS"),
}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def trees():
    names = subprocess.run(
        ["git", "ls-files", "modeling_ultrafuser", "trainers", "ultrafuser"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return {n: ast.parse((ROOT / n).read_text()) for n in names if n.endswith(".py") and n not in COMPAT}


def ours(tree):
    """Private names that a file defines: functions, classes, attributes that it sets, and names."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        ):
            yield node.attr


def uses(tree):
    """Private names that a file reads or sets on something, asks for by `getattr` and the like, or imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value):
                yield name.value, node.lineno
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((alias.name, node.lineno) for alias in node.names if is_private(alias.name))


def foreign_uses(files):
    known = {name for tree in files.values() for name in ours(tree)} - TOLD | PUBLIC
    of_super = {"_init_weights"}
    return [
        f"{file}:{line}: {name}"
        for file, tree in files.items()
        for name, line in uses(tree)
        if name not in known | of_super
    ]


def test_private_names_of_other_libraries_are_used_in_the_compat_files_alone():
    assert foreign_uses(trees()) == []


@pytest.mark.parametrize(
    "line", ["model._tp_plan = {}", "getattr(model, '_is_stateful')", "from trl.trainer.utils import _Head"]
)
def test_a_private_name_that_is_used_elsewhere_is_found(line):
    assert len(foreign_uses({"a.py": ast.parse(line)})) == 1


def subclasses():
    """Our classes that have a parent of another library, of the packages that are imported without extras."""
    import modeling_ultrafuser.modeling_ultrafuser
    import trainers.gate_cache
    import ultrafuser.decoding.stacking

    pages = [modeling_ultrafuser.modeling_ultrafuser, trainers.gate_cache, trainers, ultrafuser.decoding.stacking]
    found = {c for page in pages for c in vars(page).values() if isinstance(c, type)}
    return {parent for c in found for parent in c.__mro__ if is_ours(parent)}


def is_ours(kind):
    return kind.__module__.split(".")[0] in ("modeling_ultrafuser", "trainers", "ultrafuser")


def test_no_private_name_of_ours_hides_one_of_a_parent():
    hidden = [
        f"{kind.__name__}.{name} hides {parent.__name__}'s"
        for kind in subclasses()
        if f"{kind.__module__.replace('.', '/')}.py" not in COMPAT
        for name in vars(kind)
        if is_private(name) and name not in TOLD
        for parent in kind.__mro__
        if parent.__module__.split(".")[0] in LIBRARIES and name in vars(parent)
    ]
    assert hidden == []
