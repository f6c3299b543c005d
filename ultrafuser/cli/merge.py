"""Commands that make one ordinary model of specialists' weights."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from typer import Argument, Option

from ..plain import Console, echo
from ..strategies import LAYOUT_HELP, METHOD_HELP
from .arguments import Out, named
from .group import Group, hide_loading_bars


group = Group("Make one ordinary model")


@group.command()
def merge(
    what: Annotated[
        list[str], Argument(help="NAME=ID, NAME=ID@REVISION or NAME=FOLDER of each specialist; or one fused folder.")
    ],
    out: Annotated[Path | None, Option(help="Folder to write; it must be empty or not exist.")] = None,
    method: Annotated[str, Option(help=METHOD_HELP)] = "average",
    base: Annotated[str | None, Option(help="Model that all were tuned from: ID, ID@REVISION or folder.")] = None,
    coefficients: Annotated[
        str | None,
        Option(
            help="Factor of every change: 0.5; or text=0.6,code=0.4; or a merge.json, by layer. Default: 1, or 1 / N."
        ),
    ] = None,
    lines: Annotated[
        str | None, Option(help="START,SLOPE of LiNeS, in place of coefficients: factors that rise with depth.")
    ] = None,
    data: Annotated[
        list[str] | None,
        Option(
            help="NAME=FILE.jsonl or NAME=HUB_ID:SPLIT, rows of each specialist for regmean, of any domain for --search."
        ),
    ] = None,
    search: Annotated[
        str | None,
        Option(
            help="map: search a factor of each specialist by a quadratic fit, and show the trade-off; simplex: shares that sum to 1, the mix_weights of a training recipe."
        ),
    ] = None,
    seed: Annotated[int, Option(help="Seed of what dare drops.")] = 0,
    show: Annotated[
        bool, Option("--show", help="Only show how far the specialists' changes agree, by layer.")
    ] = False,
) -> None:
    """Merge the weights of specialists of one shape into one ordinary model, which any engine runs.

    Example: ultrafuser merge text=text-1.5b code=code-1.5b --base base-1.5b --method ties:0.2 --out merged
    """
    hide_loading_bars()
    if show:
        if out or coefficients or lines or data or search or seed or method != "average":
            raise typer.BadParameter("--show only compares changes: leave out all options but --base.")
        _show(what, base)
        return
    if out is None:
        raise typer.BadParameter("say which folder to write: --out; or only compare the changes: --show.")
    from ..merge.merged_folder import merge_folders

    options = {"coefficients": coefficients, "lines": lines, "data": named(data, "--data"), "seed": seed}
    if search is not None:
        if coefficients is not None or lines is not None:
            raise typer.BadParameter("--search finds the coefficients: leave --coefficients and --lines out.")
        options["search"] = _searching(search, method)
    table = merge_folders(what, out, method=method, base=base, **options)
    factors = table.as_dict()
    shown = factors if not table.is_even else {"all layers": next(iter(factors.values()))}
    for row, own in shown.items():
        echo(f"{row}: " + ", ".join(f"{name} {factor:.4g}" for name, factor in own.items()))
    echo(f"Wrote {str(out)!r}, a model that needs no code of this package. `merge.json` there has its coefficients.")


def _searching(how: str, method: str) -> Callable[..., None]:
    from ..merge import merge_method, searches

    searches.check(how, merge_method(method))

    def search(merge, held, work: Path) -> None:
        names, found = merge.sources.names, searches.search(merge, how, held, work)
        Console().print(searches.table(found, names))
        if found.shares:
            echo(f"Data mixed by these shares, in a recipe of `ultrafuser train`:\n{searches.recipe(found, names)}")

    return search


def _show(what: list[str], base: str | None) -> None:
    from ..merge.agreement import agreement, table
    from ..merge.sources import read_sources

    with TemporaryDirectory() as work:
        sources = read_sources(what, base, Path(work))
        Console().print(table(agreement(sources), sources.names))


@group.command()
def export(
    what: Annotated[
        list[str], Argument(help="A fused folder; or NAME=ID, NAME=ID@REVISION or NAME=FOLDER of each specialist.")
    ],
    to: Annotated[str, Option(help=LAYOUT_HELP)],
    data: Annotated[
        list[str], Option(help="NAME=FILE.jsonl or NAME=HUB_ID:SPLIT, rows of each specialist: half make routers.")
    ],
    out: Out,
    method: Annotated[str, Option(help=f"How what experts share is merged. {METHOD_HELP}")] = "average",
    base: Annotated[str | None, Option(help="Model that all were tuned from: ID, ID@REVISION or folder.")] = None,
    donor: Annotated[
        str | None, Option(help="Name of the specialist whose attention, norms and ends to take, in place of merging.")
    ] = None,
) -> None:
    """Write specialists as a stock mixture of experts: another model than the fused one, to be trained on.

    Example: ultrafuser export fused --to qwen2_moe --data text=text.jsonl --data code=code.jsonl --out experts
    """
    hide_loading_bars()
    from ..export import moe_folder

    losses = moe_folder.export(what, to, out, named(data, "--data"), method=method, base=base, donor=donor)
    Console().print(moe_folder.table(losses))
    echo(
        f"Wrote {str(out)!r}, which needs no code of this package. It is not the fused model: experts are mixed in every layer, "
        f"by routers that are not trained yet. Its README.md has the code that trains them."
    )
