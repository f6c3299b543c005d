"""Help texts about strategies. Importing them takes seconds, so that their source is read."""

import ast
from importlib.util import find_spec
from pathlib import Path


MODELLING = Path(find_spec("modeling_ultrafuser").origin).parent
ROOMS = Path(__file__).parent


def _tree(module: str, folder: Path = MODELLING) -> ast.Module:
    return ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))


def _assigned(tree: ast.Module, name: str) -> ast.expr:
    nodes = (node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign))
    return next(
        n.value for n in nodes if name in map(ast.unparse, getattr(n, "targets", [getattr(n, "target", None)]))
    )


def summaries(module: str, table: str, folder: Path = MODELLING) -> dict[str, str]:
    """Reads the first line of each strategy's docstring, by its name in a dict such as GATES of "gates_ultrafuser"."""
    tree = _tree(module, folder)
    files = {a.name: n.module for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    entries = _assigned(tree, table)
    return {k.value: _summary(files[v.id], v.id, folder) for k, v in zip(entries.keys, entries.values, strict=True)}


def _summary(module: str, name: str, folder: Path) -> str:
    docstring = ast.get_docstring(next(n for n in _tree(module, folder).body if getattr(n, "name", None) == name))
    return (docstring or "").partition("\n")[0]


def _listed(module: str, table: str, folder: Path = MODELLING) -> str:
    return " ".join(f"{name}: {summary}" for name, summary in summaries(module, table, folder).items())


DEFAULT_GATE: str = ast.literal_eval(_assigned(_tree("gates_ultrafuser"), "DEFAULT_GATE"))
# which gate? the default, the one that little text is enough for, and the paper's
CANDIDATES = (DEFAULT_GATE, "linear+calibration", "mlp:512")
GATE_HELP = (
    f"Kind of gate ({', '.join(summaries('gates_ultrafuser', 'GATES'))}), the width of its hidden layer if it has one, or "
    f"the specialist that it reads, and whether it predicts temperatures, too: mlp, anchor:NAME, linear+calibration, "
    f"cross:128+calibration."
)
FUSION_HELP = f"What is mixed. {_listed('fusions_ultrafuser', 'FUSIONS')}"
SPARSIFIER_HELP = f"Which specialists keep a weight at a token. {_listed('sparsifiers_ultrafuser', 'SPARSIFIERS')}"
METHODS = list(summaries("__init__", "MERGES", ROOMS / "merge"))
METHOD_HELP = f"Method: {', '.join(METHODS)}. Some take a setting, as in ties:0.2, dare:0.2 or layer_swap:5,4."
LAYOUT_HELP = f"Layout. {_listed('__init__', 'LAYOUTS', ROOMS / 'export')}"
ROUTER_HELP = (
    f"How a router weighs the specialists for a whole request. {_listed('__init__', 'ROUTERS', ROOMS / 'route')}"
)
