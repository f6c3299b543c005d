"""Tables the study at a real size, the worst news for the fused model first."""

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean

from experiments.real_averages import (
    BASE,
    DOMAIN_OF,
    DOMAINS,
    FUSED,
    SPECIALISTS,
    UNFAIR,
    Estimate,
    difference,
    kept,
    loss,
    loss_difference,
    parts,
    results,
    right_specialist,
    share,
    shared_questions,
)
from ultrafuser.reports.marked_tables import markdown


ENOUGH = 0.95  # of what the right specialist solves
LEARNED = ("math", "code", "text")  # by students
Found = Mapping[str, list[dict]]
Shares = dict[str, Estimate | None]


def worst_news(path: Path) -> str:
    """Tables the best of every measure that is not fused and knows no answers, and how far the fused model is from it.

    Differences are such that below 0 the fused model is worse; those come first, the largest before the others.
    """
    found = results(path)
    rows = [_solving(found, part) for part in parts(found)] + [_predicting(found, domain) for domain in DOMAINS]
    rows.sort(key=lambda row: row[0])
    return markdown(
        ["", "fused", "the best other", "its own", "fused to it", "ahead of fused", "surely"], [row[1] for row in rows]
    )


def _others(found: Found) -> list[str]:
    return [name for name in found if not name.startswith(FUSED) and name not in UNFAIR]


def _solving(found: Found, part: str) -> tuple[float, list[str]]:
    there = {name: difference(found[FUSED], found[name], part) for name in _others(found)}
    there = {name: own for name, own in there.items() if own}
    # not every contender was asked every question: who is best shows on what it shares with the fused model
    best = min(there, key=lambda name: there[name].value)
    pair = {name: found[name] for name in (FUSED, best)}
    fused, other = (share(own, part, shared_questions(pair, part)) for own in pair.values())
    apart = there[best]
    cells = [f"{part}, solved", percent(fused), best, percent(other), points(apart)]
    return apart.value, [*cells, *_ahead(there.values())]


def _predicting(found: Found, domain: str) -> tuple[float, list[str]]:
    there = {name: loss_difference(found[name], found[FUSED], domain) for name in _others(found)}
    best = min(there, key=lambda name: there[name].value)
    own, other, apart = loss(found[FUSED], domain), loss(found[best], domain), there[best]
    cells = [f"{domain}, nats per token", f"{own.value:.3f}", best, f"{other.value:.3f}"]
    cells.append(f"{apart.value:+.3f} [{apart.low:+.3f}, {apart.high:+.3f}]")
    return apart.value, [*cells, *_ahead(there.values())]


def _ahead(differences) -> list[str]:
    own = list(differences)
    return [f"{sum(d.value < 0 for d in own)} of {len(own)}", str(sum(d.high < 0 for d in own))]


def percent(own: Estimate | None) -> str:
    """Writes a share with its interval."""
    return f"{100 * own.value:.0f} % [{100 * own.low:.0f}, {100 * own.high:.0f}]" if own else ""


def points(own: Estimate | None) -> str:
    """Writes a difference of shares with its interval, in percentage points."""
    return f"{100 * own.value:+.0f} [{100 * own.low:+.0f}, {100 * own.high:+.0f}]" if own else ""


def headline(path: Path) -> str:
    """Tables the mean of what every contender solves, and of its losses, the one that solves most first."""
    found = results(path)
    means = _means(_shares(found))
    rows = [
        [name, f"{100 * means[name]:.1f} %", f"{mean(loss(found[name], domain).value for domain in DOMAINS):.3f}"]
        for name in sorted(means, key=means.get, reverse=True)
    ]
    return markdown(["", "solves", "nats per token"], rows)


def solved(path: Path) -> str:
    """Tables the share of each part that every contender solves, of the questions that all were asked; the best mean first."""
    found = results(path)
    cells = _shares(found)
    means, common = _means(cells), _common(cells)
    asked = parts(found)
    rows = [
        [name, f"{100 * means[name]:.1f} %", *(percent(cells[name][part]) for part in asked)]
        for name in sorted(means, key=means.get, reverse=True)
    ]
    title = "mean" if common == asked else f"mean of the {len(common)} that all were asked"
    return markdown(["", title, *(f"{part}, {len(shared_questions(found, part))}" for part in asked)], rows)


def _shares(found: Found) -> dict[str, Shares]:
    among = {part: shared_questions(found, part) for part in parts(found)}
    return {name: {part: share(own, part, rows) for part, rows in among.items()} for name, own in found.items()}


def _common(cells: Mapping[str, Shares]) -> list[str]:
    """Returns the parts that all were asked."""
    return [part for part in next(iter(cells.values())) if all(own[part] for own in cells.values())]


def _means(cells: Mapping[str, Shares]) -> dict[str, float]:
    return {name: mean(own[part].value for part in _common(cells)) for name, own in cells.items()}


def nats(path: Path) -> str:
    """Tables nats per token of held-out answers, the lowest mean first, with the difference from the fused model."""
    found = results(path)
    losses = {name: [loss(own, domain).value for domain in DOMAINS] for name, own in found.items()}
    rows = []
    for name in sorted(losses, key=lambda name: mean(losses[name])):
        apart = [loss_difference(found[name], found[FUSED], domain) for domain in DOMAINS]
        behind = f"{sum(d.high < 0 for d in apart)} lower, {sum(d.low > 0 for d in apart)} higher"
        rows.append([name, f"{mean(losses[name]):.3f}", *(f"{x:.3f}" for x in losses[name]), behind])
    return markdown(["", "mean", *DOMAINS, "surely, of 5, to fused"], rows)


def students(path: Path) -> str:
    """Tables what students and adapters learned: how much of the gap from the base to the fused model they close.

    Nats are the mean over the domains that they learn on; "solves" is the mean of the parts that all were asked. With the
    least and the most of the seeds, where there are several.
    """
    found = results(path)
    common = _common(_shares(found))
    among = {part: shared_questions(found, part) for part in common}

    def nats_of(seeds: list[dict]) -> float:
        return mean(loss(seeds, domain).value for domain in LEARNED)

    def solves(seeds: list[dict]) -> float:
        return mean(share(seeds, part, among[part]).value for part in common)

    def closed(seeds: list[dict], of: Callable[[list[dict]], float]) -> str:
        start, whole = of(found[BASE]), of(found[BASE]) - of(found[FUSED])
        average, *each = (round(100 * (start - of(some)) / whole) for some in (seeds, *([one] for one in seeds)))
        return f"{average} %" + (f" ({min(each)} to {max(each)})" if len(each) > 1 else "")

    names = [name for name in found if name.startswith("student") or name.startswith(f"{BASE}, tuned")]
    rows = []
    for name in sorted([FUSED, *names, BASE], key=lambda name: nats_of(found[name])):
        own = found[name]
        functions = loss(own, "functions").value
        rows.append(
            [name, f"{nats_of(own):.3f}", closed(own, nats_of), f"{functions:.3f}"]
            + [f"{100 * solves(own):.1f} %", closed(own, solves)]
        )
    return markdown(["", "nats per token", "gap closed", "functions", "solves", "gap closed"], rows)


def retention(path: Path) -> str:
    """Tables points that each contender gains or loses on each part against the base, the largest loss first.

    The last column is what it keeps of all that the base solves.
    """
    found = results(path)
    asked, rows = parts(found), []
    for name, own in found.items():
        if name != BASE:
            changes = [difference(own, found[BASE], part) for part in asked]
            worst = min(change.value for change in changes if change)
            rows.append((worst, [name, *map(points, changes), percent(kept(own, dict.fromkeys(asked, found[BASE])))]))
    rows.sort(key=lambda row: row[0])
    return markdown(["points to the base", *asked, "keeps of what the base solves"], [row for _, row in rows])


def keeping(path: Path) -> str:
    """Tables the share of what the right specialist of each domain solves that a contender solves, too, the least first.

    A line for each fused model says in which domains that is 95 %, and in which parts it is less.
    """
    found = results(path)
    right = {part: right_specialist(found, part) for part in parts(found)}
    domains = list(dict.fromkeys(DOMAIN_OF[part] for part in right))
    cells = {name: _kept(own, found, right) for name, own in found.items() if name not in SPECIALISTS.values()}
    least = {name: min((own[d].value for d in domains if own[d]), default=1.0) for name, own in cells.items()}
    order = sorted(least, key=least.get)
    table = markdown(["", *domains], [[name, *(_of(cells[name][domain]) for domain in domains)] for name in order])
    lines = [
        verdict(name, {d: cells[name][d] for d in domains}, {part: cells[name][part] for part in right})
        for name in order
        if name.startswith(FUSED)
    ]
    return "\n\n".join([table, *lines])


def _kept(own: list[dict], found: Found, right: Mapping[str, str]) -> dict[str, Estimate | None]:
    """Returns what a contender keeps of the right specialist's, by domain and by part."""
    kinds = {part: [part] for part in right}
    for part in right:
        kinds.setdefault(DOMAIN_OF[part], []).append(part)
    return {kind: kept(own, {part: found[right[part]] for part in its}) for kind, its in kinds.items()}


def _of(own: Estimate | None) -> str:
    return f"{percent(own)} of {own.of}" if own else ""


def verdict(name: str, domains: Mapping[str, Estimate | None], of_parts: Mapping[str, Estimate | None]) -> str:
    """Says in how many domains a contender keeps enough of what the right specialist solves, and in which parts not."""
    there = [own for own in domains.values() if own]
    short = sorted(
        (part for part, own in of_parts.items() if own and own.value < ENOUGH), key=lambda p: of_parts[p].value
    )
    said = f"{name[0].upper()}{name[1:]}: keeps at least {ENOUGH:.0%} of what the right specialist solves in "
    said += f"{sum(own.value >= ENOUGH for own in there)} of {len(there)} domains."
    listed = ", ".join(f"{part} {percent(of_parts[part])} of {of_parts[part].of}" for part in short)
    return f"{said} Parts below: {listed}." if short else said


TABLES: dict[str, Callable[[Path], str]] = {
    "real, headline": headline,
    "real, worst news": worst_news,
    "real, solved": solved,
    "real, nats": nats,
    "real, retention": retention,
    "real, keeping": keeping,
    "real, students": students,
}
