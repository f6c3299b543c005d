"""From a real base and the adapters that come with this package to a fused model that one can talk to, in minutes.

Every finished step is kept, so that a run that was killed goes on: the base's folder, rows of the cached pass, the fused
model with its gate, each measured row of the table, each answer.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from modeling_ultrafuser import UltraFuserForCausalLM, log_ultrafuser
from modeling_ultrafuser.files_ultrafuser import read_json
from modeling_ultrafuser.refusals_ultrafuser import Refusal
from trainers import CachedGateTrainer, GateStageConfig
from trainers.progress import Progress

from ..atomic import sole_writer, write_json
from ..build.fusion_recipe import FusionRecipe, FusionSettings
from ..evaluation.baselines import ensemble
from ..evaluation.measurement import HeldOut, score
from ..plain import Console
from ..pretrained import open_fused
from ..provenance import provenance
from ..serve.chat import Speech, print_piece, prompt_ids, speak, speakers
from .outcome import loss_table, reload_elsewhere
from .real_base import DEFAULT, check_base, local_base
from .real_data import Materials, by_domain, held_out_by_domain
from .training import QUIET, train


COMMAND = "quickstart --real"
SETTINGS, RESULTS, ANSWERS = "settings.json", "results.json", "answers.json"
MADE = ("base", "cache", "stage_one", "fused", SETTINGS, RESULTS, ANSWERS)
UNIFORM, FUSED = "uniform fusion", "fused: the gate"
SHOWN = 12  # tokens that the reloaded model says again


@dataclass
class Schedule:
    """Settings of fitting the gate.

    Attributes:
        gate: As in `ultrafuser fuse --gate`.
        keep: What the cache keeps of each token, a name in `Head.kept`.
        steps: Of the optimizer.
        rate: Learning rate.
        examples: Of each domain and step; two of each are read at once.
    """

    gate: str = "cross:128"
    keep: str = "top"
    steps: int = 300
    rate: float | None = None
    examples: int = 4


def run(
    out: Path,
    base: str = DEFAULT,
    *,
    seed: int = 0,
    overwrite: bool = False,
    materials: Materials | None = None,
    schedule: Schedule | None = None,
) -> dict[str, dict[str, float]]:
    """Fuses a base and adapters of it, fits the gate, measures, saves, answers, and reloads elsewhere.

    Args:
        out: Folder to write, or to go on with.
        base: Folder, GGUF file, or ID@REVISION on the Hub.
        seed: Same seed, same numbers on the same machine.
        overwrite: Begin anew.
        materials: Adapters and conversations. Default: those that come with this package.
        schedule: How the gate is fitted.

    Returns:
        Held-out loss in nats per token, by row of the printed table and domain.

    Raises:
        ValueError: If the base does not fit the adapters, or `out` was begun with other settings.
        OSError: If the base is not there, or `out` cannot be written.
    """
    materials, schedule = materials or Materials(), schedule or Schedule()
    source = check_base(base, materials.adapters)
    settings = {"base": base, "base_commit": source.commit, "seed": seed, "schedule": asdict(schedule)}
    with sole_writer(out, COMMAND, MADE, overwrite=overwrite):
        _begin(out, settings, overwrite)
        say, began = Console().print, time.monotonic()
        set_seed(seed)
        say(f"1/4 The base: {base}", style="bold")
        place = local_base(source, out)
        say(
            "2/4 Three specialists of it, fused; the gate is fitted on one pass over a few conversations", style="bold"
        )
        folder = _fused(out, place, materials, schedule, seed, say)
        say("3/4 Losses on conversations that nothing was trained on", style="bold")
        model, tokenizer = open_fused(folder)
        rows = _measured(out, settings, model, held_out_by_domain(materials.held_out_rows, tokenizer))
        Console(markup=True).print(loss_table(rows, UNIFORM))
        say("\n4/4 Answers, in the colour of the specialist that leads", style="bold")
        answers = _answers(out, model, tokenizer, materials)
        _reload(folder, materials, answers)
        _print_ways(folder, (time.monotonic() - began) / 60)
    return rows


def _begin(out: Path, settings: dict, overwrite: bool) -> None:
    """Takes away what an earlier run made, if asked to, and refuses to go on with what was begun otherwise."""
    file = out / SETTINGS
    if overwrite:
        for path in map(out.joinpath, MADE):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if not file.exists():
        write_json(file, settings)
    found = read_json(file)
    if other := {key: found.get(key) for key in settings if found.get(key) != settings[key]}:
        raise Refusal(
            f"{str(out)!r} was begun with {other}, and now they are { {key: settings[key] for key in other} }",
            "A run that is gone on with has the settings that it began with",
            "Choose another folder with --out, or begin anew with --overwrite.",
            about="settings",
        )


def _fused(out: Path, base: str, materials: Materials, schedule: Schedule, seed: int, say: Callable) -> Path:
    """Returns the folder of the fused model, whose gate is fitted before it is written."""
    folder = out / "fused"
    if not folder.exists():
        recipe = FusionRecipe(
            FusionSettings(materials.specialists(base), gate=schedule.gate, base=base), dtype="float32"
        )

        def fit(model: UltraFuserForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
            _fit_gate(model, tokenizer, out, materials, schedule, seed)

        recipe.build(folder, say=say, train=fit)
    for name in ("cache", "stage_one"):
        shutil.rmtree(out / name, ignore_errors=True)
    return folder


def _fit_gate(
    model: UltraFuserForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    materials: Materials,
    schedule: Schedule,
    seed: int,
) -> None:
    """Runs the specialists once over the conversations, and trains the gate on what they said."""
    data = {domain: Dataset.from_list(rows) for domain, rows in by_domain(materials.gate_rows).items()}
    arguments = GateStageConfig(
        str(out / "stage_one"),
        max_steps=schedule.steps,
        learning_rate=schedule.rate,
        per_device_train_batch_size=2 * len(data),
        examples_per_domain=schedule.examples,
        max_length=512,
        bf16=False,
        gradient_checkpointing=False,
        # rows of two domains are among the conversations
        mixed_share=0.0,
        seed=seed,
        **QUIET,
    )
    with _no_advice():
        settings = {"processing_class": tokenizer, "cache": out / "cache", "keep": schedule.keep}
        train(CachedGateTrainer(model, arguments, data, **settings), "gate")


@contextmanager
def _no_advice() -> Iterator[None]:
    """Leaves out what is of use to somebody with data of their own: how large the cache is, whether there is enough text."""
    logger = logging.getLogger(log_ultrafuser.__name__)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _measured(
    out: Path, settings: dict, model: UltraFuserForCausalLM, data: dict[str, HeldOut]
) -> dict[str, dict[str, float]]:
    """Returns the losses of the base, each specialist, all alike, and the fused model; each row is kept once it is there."""
    found = read_json(out / RESULTS) if (out / RESULTS).exists() else {**settings, **provenance()}
    rows = found.setdefault("nats_per_token", {})
    contenders: dict[str, Callable[[], PreTrainedModel]] = {
        "base" if name == "text" else f"{name} specialist": lambda name=name: model.specialist(name)
        for name in model.config.specialist_names
    }
    contenders |= {UNIFORM: lambda: ensemble(model, "uniform", model.config.fusion), FUSED: lambda: model}
    for name, contender in contenders.items():
        if name not in rows:
            rows[name] = _losses(contender(), data, name)
            write_json(out / RESULTS, found)
    return rows


def _losses(model: PreTrainedModel, data: dict[str, HeldOut], title: str) -> dict[str, float]:
    losses = {}
    with Progress(title, sum(map(len, data.values()))) as progress:
        for domain, examples in data.items():
            found = score(model, examples, batch_size=4).losses[examples.scored]
            progress.add(len(examples))
            losses[domain] = round(found.mean().item(), 4)
    return losses


def _answers(
    out: Path, model: UltraFuserForCausalLM, tokenizer: PreTrainedTokenizerBase, materials: Materials
) -> dict[str, list]:
    """Returns pieces of each prompt's answer with their gate weights, printed as they come; each answer is kept."""
    console, names = Console(), model.config.specialist_names
    found = read_json(out / ANSWERS) if (out / ANSWERS).exists() else {}
    for prompt in materials.prompts.values():
        console.print(f"\n> {prompt}", style="bold")

        def show(piece: str, weights: list[float]) -> None:
            print_piece(console, names, piece, weights)

        if prompt in found:
            for piece in found[prompt]:
                show(*piece)
        else:
            found[prompt] = _answer(model, tokenizer, prompt, materials.new_tokens, show)
            write_json(out / ANSWERS, found)
        mean = [sum(column) / len(column) for column in zip(*(w for _, w in found[prompt]), strict=True)]
        console.print()
        console.print(speakers(names, mean))
    return found


def _answer(
    model: UltraFuserForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int, show: Callable
) -> list[tuple[str, list[float]]]:
    pieces: list[tuple[str, list[float]]] = []

    def keep(piece: str, weights) -> None:
        pieces.append((piece, [round(w, 3) for w in weights.tolist()]))
        show(*pieces[-1])

    conversation = [{"role": "user", "content": prompt}]
    speak(model, prompt_ids(tokenizer, conversation), Speech(tokenizer, keep), new_tokens, do_sample=False)
    return pieces


def _reload(folder: Path, materials: Materials, answers: dict[str, list]) -> None:
    """Loads the folder where this package cannot be imported, and compares the beginning of an answer."""
    prompt = next(iter(materials.prompts.values()))
    [said] = reload_elsewhere(folder, [[{"role": "user", "content": prompt}]], SHOWN)
    answer = "".join(piece for piece, _ in answers[prompt])
    same = "the same" if answer.startswith(said) else f"something else: {said!r}"
    Console().print(f"\nReloaded in a process that cannot import this package: it says {same}.")


def _print_ways(folder: Path, minutes: float) -> None:
    Console().print(
        f"Took {minutes:.1f} minutes. {str(folder)!r} is one folder that loads anywhere:\n\n"
        f"  ultrafuser chat {folder}     in this terminal, coloured\n"
        f"  ultrafuser serve {folder}    for OpenAI's client\n"
        f"  ultrafuser demo {folder}     in a browser",
        soft_wrap=True,
    )
