"""Compares a fused model of a real base and adapters of it with all that one could do instead.

Base, adapters, data and HumanEval lie in the work folder; nothing is downloaded. Whatever takes long is kept there, in
`study/`: steps of tuning, rows of a cached pass, blocks of answers, losses of a domain. So a run that is killed goes on, and
answers of specialists are shared by routers and oracles.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from datasets import disable_progress_bars
from transformers.utils import logging

from experiments.real import study_contenders
from experiments.real.measuring import LOSSES, counted
from experiments.real.parts import PARTS
from experiments.real.routing import CHOOSERS, Oracle, Routed
from experiments.real.workshop import Workshop
from modeling_ultrafuser.fusions_ultrafuser import FUSIONS, fusion_class
from modeling_ultrafuser.gates_ultrafuser import gate_settings
from ultrafuser.evaluation import sandbox
from ultrafuser.merge import MERGES


SHOWN = 2  # answers of each part in a result file
# contenders that are nothing but answers of specialists
FROM_SPECIALISTS = {
    "single": lambda shop, adapter="text": shop.specialist(adapter),
    "router": lambda shop, by: Routed(shop, CHOOSERS[by]),
    "oracle": lambda shop, each: Oracle(shop, each),
}


def study(
    seed: int,
    work: Path,
    *,
    contender: dict,
    questions: dict[str, int | None],
    materials: dict,
) -> dict:
    """Measures one contender.

    Args:
        seed: Of gates, draws and new adapters.
        work: Folder with base, adapters, data and packages, and for all that is made.
        contender: `make`, a name in `study_contenders.MAKERS` or `FROM_SPECIALISTS`, and the maker's settings.
        questions: Questions of each kind, by part; None for all, 0 to leave the part out.
        materials: As `Workshop` takes them.

    Returns:
        By part which questions are right, and by domain the loss of each conversation.
    """
    logging.disable_progress_bar()
    disable_progress_bars()
    shop = Workshop(work, seed, **materials)
    asked = _asked(shop, contender)
    losses = {domain: asked.losses(domain, shop.held_out(domain)) for domain in LOSSES}
    parts = {part: _measured(shop, asked, part, count) for part, count in questions.items() if count != 0}
    return {
        "answering_seconds": round(asked.seconds(), 1),
        "sandbox": sandbox.confinement(),
        "weights": shop.identity,
        "losses": {
            domain: {"nats": [round(nats, 3) for nats, _ in own], "tokens": [count for _, count in own]}
            for domain, own in losses.items()
        },
        "parts": parts,
    }


def rules(seed: int, work: Path, *, model: dict, rule: str, questions: dict[str, int | None], materials: dict) -> dict:
    """Asks a fused model, whose logits a rule for decoding joins.

    Args:
        seed: Of the gate.
        work: As for `study`, and so are `questions` and `materials`.
        model: As `contender` of `study`.
        rule: The rule, as a configuration names it.

    Returns:
        By part which questions are right.
    """
    logging.disable_progress_bar()
    disable_progress_bars()
    shop = Workshop(work, seed, **materials)
    asked = shop.asked(shop.place(model | {"rule": rule}, True), lambda: _with_rule(shop, model, rule))
    return {"parts": {part: _measured(shop, asked, part, count) for part, count in questions.items()}}


def _with_rule(shop: Workshop, contender: dict, rule: str):
    fused = study_contenders.model_of(shop, shop.place(contender, True), contender)
    fused.config.fusion = rule
    fused.model.fusion_rule = fusion_class(rule)(fused.config)
    return fused


def _asked(shop: Workshop, contender: dict):
    if contender["make"] in FROM_SPECIALISTS:
        how = {name: value for name, value in contender.items() if name != "make"}
        return FROM_SPECIALISTS[contender["make"]](shop, **how)
    place = shop.place(contender, contender["make"] in study_contenders.SEEDED)
    return shop.asked(place, lambda: study_contenders.model_of(shop, place, contender))


def _measured(shop: Workshop, asked, part: str, count: int | None) -> dict:
    """Asks one part, and marks the answers."""
    places, rows = shop.questions(part, count)
    chosen = ""
    if isinstance(asked, Oracle):
        checks, chosen = asked.checked({n: _checked(shop, shop.specialist(n), part, rows)[0] for n in shop.names})
        replies = []
    else:
        checks, replies = _checked(shop, asked, part, rows)
    marks = {name: "".join(str(int(check[name])) for check in checks) for name in checks[0]}
    kinds = counted([row["kind"] for row in rows], checks)["kinds"]
    return {"rows": places, **marks, "kinds": kinds, "chosen": chosen, "replies": replies[:SHOWN]}


def _checked(shop: Workshop, asked, part: str, rows: list[dict]) -> tuple[list[dict[str, bool]], list[str]]:
    what = PARTS[part]
    replies = asked.answers(part, [what.question(row) for row in rows], what.longest)
    with ThreadPoolExecutor(shop.workers) as pool:
        return list(pool.map(what.check, rows, replies)), replies


def check(*, contender: dict, questions: dict, materials: dict) -> None:
    """Checks that a contender is one that can be made, and parts are there."""
    known = [*study_contenders.MAKERS, *FROM_SPECIALISTS]
    if contender.get("make") not in known:
        raise ValueError(f"`make` is one of {known}, but is {contender.get('make')!r}.")
    if unknown := set(questions) - set(PARTS):
        raise ValueError(f"Parts are {list(PARTS)}, but `questions` has {sorted(unknown)}.")
    if contender["make"] == "fused":
        gate_settings(contender["gate"])
    chosen = {"fusion": FUSIONS, "method": MERGES, "by": CHOOSERS}
    for name, choices in chosen.items():
        if name in contender and contender[name] not in choices:
            raise ValueError(f"`{name}` is one of {list(choices)}, but is {contender[name]!r}.")


def check_rules(*, model: dict, rule: str, **asked) -> None:
    """Checks that there is such a model, and such a rule."""
    check(contender=model, **asked)
    fusion_class(rule)


RUNS = {"real": study, "rules": rules}
CHECKS = {"real": check, "rules": check_rules}
