"""Tables of what was tried out on purpose: dirty data, every family, damaged files, stops and strangers."""

import json
from pathlib import Path

from experiments.averages import files
from ultrafuser.reports.marked_tables import markdown


def cleaning(path: Path) -> str:
    """Tables how many of the planted records the data filters find, and the cost of cleaning by the number of records."""
    found = files(path)[0]
    plants = [[name, *map(str, (p["planted"], p["found"]))] for name, p in found["recall"]["plants"].items()]
    wrong = ["dropped among the others", str(found["recall"]["others"]), str(found["recall"]["false_positives"])]
    columns = "records_per_second", "processor_milliseconds_per_record", "peak_mib", "load_average"
    rows = [[f"{row['records']:,}", *(f"{row[c]:,}" for c in columns)] for row in found["rows"]]
    heads = ["records", "per second", "processor ms each", "peak MiB", "load"]
    return "\n\n".join([markdown(["", "records", "found"], [*plants, wrong]), markdown(heads, rows)])


def families_fused(path: Path) -> str:
    """Tables how every use of every family that can be fused ends, with itself and with Llama."""
    found = {f: its for f, its in files(path)[0]["families"].items() if isinstance(its.get("itself"), dict)}
    uses = list(next(iter(found.values()))["itself"])
    rows = []
    for family, its in found.items():
        pairs = [its[pair] for pair in ("itself", "Llama") if isinstance(its[pair], dict)]
        cells = [[_ENDINGS[pair[use].partition(":")[0]] for pair in pairs] for use in uses]
        rows.append([f"`{family}`", *(" / ".join(dict.fromkeys(both)) for both in cells)])
    return markdown(["family", *uses], rows)


_ENDINGS = {"right": "✓", "as alone": "as alone", "refused": "refused", "wrong": "wrong"}


def families_refused(path: Path) -> str:
    """The sentence that refuses a family."""
    found = files(path)[0]["families"].items()
    told = {f: its["itself"] for f, its in found if isinstance(its.get("itself"), str)}
    return markdown(["family", "what is said"], [[f"`{f}`", _cell(said)] for f, said in told.items()])


def families_not_built(path: Path) -> str:
    """Why a family was not tried."""
    found = files(path)[0]["families"].items()
    told = {f: its["not tiny"] for f, its in found if "not tiny" in its}
    return markdown(["family", "why"], [[f"`{f}`", _cell(said)] for f, said in told.items()])


def _cell(text: str) -> str:
    return f"`` {text.removeprefix('refused: ').replace('|', '¦')} ``"


def verbatim(path: Path) -> str:
    """Returns the output of a command."""
    return f"```\n{path.read_text().rstrip()}\n```"


def servers(path: Path) -> str:
    """Tables the fate of simultaneous clients and strangers, from `python -m tests.load`."""
    found = files(path)[0]
    rows = []
    for command in ("serve", "demo"):
        one = found[command]
        memory = f"{one['memory before, MB']} to {one['memory after, MB']} MB"
        rows.append([f"`{command}`", str(one["asked"]), str(one["answered as alone"]), memory])
    threads = found["threads"]
    right = threads["asked"] - threads["answered otherwise"]
    rows.append([f"{threads['threads']} threads, {threads['ways']} ways", str(threads["asked"]), str(right), ""])
    strangers = [[kind, str(count)] for kind, count in sorted(found["serve"]["strangers"].items())]
    return "\n\n".join(
        [
            markdown(["", "asked", "answered as alone", "memory before and after"], rows),
            markdown(["strangers beside `serve`'s clients", "times"], strangers),
        ]
    )


def damaged(path: Path) -> str:
    """Tables the outcomes of randomly damaged files, by kind."""
    counts = json.loads(path.read_text())["counts"]
    heads = ["", "mutations", *next(iter(counts.values()))]
    return markdown(heads, [[k, f"{sum(c.values()):,}", *(f"{n:,}" for n in c.values())] for k, c in counts.items()])


def durability(path: Path) -> str:
    """Stops and full disks that each command came through, from `python -m tests.durability`."""
    rows = []
    for command, one in files(path)[0]["commands"].items():
        disks = one["disks"]
        stops = (
            f"{one['survived']} of {one['kills']}",
            *(f"{one[kind]['survived']} of {one[kind]['sent']}" for kind in ("SIGTERM", "SIGINT")),
        )
        twice = "one ran, one was told" if one["twice"]["held"] else "no"
        told = f"{disks['in_a_sentence'] + disks['read_only_told']} of {disks['full'] + 1}"
        rows.append([f"`{command}`", *stops, twice, told, f"{disks['same_with_room']} of {len(disks['sizes'])}"])
    heads = "kills survived", "SIGTERM", "Ctrl-C", "twice at once", "full or read-only disks told in a sentence"
    return markdown(["", *heads, "the same with room again"], rows)
