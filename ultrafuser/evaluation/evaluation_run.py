"""One command, one table: what `ultrafuser evaluate` does."""

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from rich import box
from rich.table import Column, Table
from transformers import PreTrainedTokenizerBase

from modeling_ultrafuser import UltraFuserConfig
from modeling_ultrafuser.fusions_ultrafuser import check_loss
from modeling_ultrafuser.tokenizer_ultrafuser import TOKENIZER_PROBE, load_tokenizer

from .. import pretrained
from ..atomic import sole_writer, write_json
from ..pretrained import fused_config
from ..provenance import provenance, weights_digest
from .comparison import SCORES, compare_models
from .contenders import FUSED, Comparison
from .held_out_files import check_domains, read_domains
from .measurement import MIXED


WRITES = (SCORES, "results.json")


def evaluate(
    model: str,
    data: Mapping[str, str],
    out: Path,
    *,
    tune: Mapping[str, str] | None = None,
    specialists_of: str | None = None,
    base: str | None = None,
    also: Mapping[str, str] | None = None,
    examples: int = 200,
    max_length: int = 1024,
    prompt_tokens: int = 32,
    seed: int = 0,
) -> dict:
    """Measures a fused model against its specialists and every baseline that they allow.

    Args:
        model: Folder or Hub id of a fused model.
        data: Held-out data by domain: a JSON Lines file, or a data set of the Hub as `id` or `id:split`. Rows have
            `text`, `messages`, or `prompt` and `completion`. Items of a domain named "mixed" need several domains at
            once; they are no part of the means.
        out: Folder for `results.json` and the scores. A run that was killed goes on there.
        tune: Other data by domain, to tune constant weights, a router and the weights of merges with.
        specialists_of: Fused model whose specialists are the untouched ones, if `model` went through stage two.
        base: The model that all specialists were tuned from, for merges.
        also: Further models to compare with, by name: a single model tuned on the same data, an earlier stage.
        examples: Of each domain at most.
        max_length: Longer examples are cut, in tokens; to the model's context if that is shorter.
        prompt_tokens: First tokens of plain text, which routers read and nobody is scored on.
        seed: Of controls, merges and resampling.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: If a row of the data is malformed, or a model is of the wrong kind or reads other tokens: before
            any is loaded.
        OSError: If data or a model cannot be read.
    """
    check_domains(data)
    config = fused_config(model)
    check_loss(config)
    context = config.max_position_embeddings
    if specialists_of:
        fused_config(specialists_of)
    tokenizer = pretrained.load_tokenizer(model)
    others = [path for path in (specialists_of, base, *(also or {}).values()) if path]
    for path in others:
        _check_reads_alike(path, tokenizer)
    limits = {"max_length": min(max_length, context or max_length), "prompt_tokens": prompt_tokens}
    held, tuning = (read_domains(sources or {}, tokenizer, examples=examples, **limits) for sources in (data, tune))
    # one device only: a specialist's part of the head does not follow it to another
    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = partial(pretrained.load_model, dtype="auto", device_map=device)
    fused = load(model)
    ingredients, tuned_from = load(specialists_of) if specialists_of else fused, load(base) if base else None
    comparison = Comparison(fused, ingredients, tokenizer, held, tuning, tuned_from, seed)
    asked = {"model": model, "specialists_of": specialists_of, "base": base, "also": dict(also or {}), "seed": seed}
    # of every tensor the first numbers: whatever trains a model changes them
    weights = {"weights": _digest([p.detach().flatten()[:64] for p in fused.parameters()])}
    weights["others"] = {path: weights_digest(Path(path)) for path in others}
    tokens, tuned = ({d: _digest([x.input_ids, x.scored]) for d, x in sets.items()} for sets in (held, tuning))
    more = {name: partial(load, path) for name, path in (also or {}).items()}
    identity = {**asked, **weights, "data": tokens, "tune": tuned}
    with sole_writer(out, "evaluate", WRITES, begun=[f"{SCORES}/run.json"]):
        results = compare_models(comparison, out, more=more, identity=identity)
        results = {**provenance(), "config": asked | limits, "prompt_tokens": prompt_tokens, **results}
        write_json(out / "results.json", results)
    return results


def _check_reads_alike(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    # whether it is there at all shows now, not after hours spent on the others
    if isinstance(config := pretrained.load_config(path), UltraFuserConfig):
        check_loss(config)
    own = load_tokenizer(path)
    if own is None:
        return
    ours, theirs = (t.encode(TOKENIZER_PROBE, add_special_tokens=False) for t in (tokenizer, own))
    if ours != theirs:
        raise ValueError(
            f"Losses per token compare between models that read the same tokens, but {path!r} makes {len(theirs)} tokens "
            f"of a test sentence, the fused model {len(ours)}, and not the same ones. Leave it out, or compare both with "
            f"`ultrafuser bench`."
        )


def _digest(tensors: list[torch.Tensor]) -> str:
    """A fingerprint of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def tables(results: dict) -> list[Table]:
    """The outcome on a screen: losses, then what changed and what it costs. Rows ahead of the fused model come first."""
    domains = [d for d in results["domains"] if d != MIXED]
    mixed = [MIXED] if MIXED in results["domains"] else []
    losses = _table("Held-out loss, nats per token (lower is better)", [*domains, "mean", "to fused", "95 %", *mixed])
    prices = _table("What it keeps, and what it costs", ["retains", "gains", "parameters", "per token", "speed"])
    for row in results["rows"]:
        fused, price = row["name"] == FUSED, row["cost"]
        style = "bold" if fused else ""
        low, high = row["difference_interval"]
        difference = ["", ""] if fused else [f"{row['difference']:+.3f}", f"{low:+.3f} {high:+.3f}"]
        own = [f"{row['loss'][d]:.3f}" for d in domains] + [f"{row['mean']:.3f}", *difference]
        losses.add_row(row["name"], *own, *(f"{row['loss'][d]:.3f}" for d in mixed), style=style)
        shares = [f"{row['retention']:.1%}", f"{row['positive_flips']:.1%}"]
        counts = [_count(price["parameters"]), _count(price["parameters_per_token"]), f"{price['speed']:.2f}"]
        prices.add_row(row["name"], *shares, *counts, style=style)
    losses.caption = (
        "an oracle is told what nobody could know, such as the best specialist of each domain: it is no rival"
    )
    prices.caption = (
        "retains: of the tokens that the domain's best specialist gets right, the share that is right here too; gains: "
        "share of all tokens that are right here and wrong there; parameters held, and read for each token; speed of one "
        "request relative to one specialist"
    )
    return [losses, prices]


def _table(title: str, columns: list[str]) -> Table:
    numbers = [Column(name, justify="right", no_wrap=True) for name in columns]
    looks = {"title_justify": "left", "caption_justify": "left", "box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
    return Table("", *numbers, title=title, **looks)


def _count(number: float) -> str:
    for unit in ("", "K", "M", "B"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def verdict(results: dict) -> str:
    """In a sentence or two, whether fusing paid; sure at 5 % over all rivals together (Holm, 1979)."""
    fused = next(row for row in results["rows"] if row["name"] == FUSED)
    rivals = [row for row in results["rows"] if row["name"] != FUSED and "oracle" not in row["name"]]
    sure = set()
    for rank, row in enumerate(sorted(rivals, key=lambda row: row["p"])):
        if row["p"] > 0.05 / (len(rivals) - rank):
            break
        sure.add(row["name"])
    ahead = [row for row in rivals if row["name"] in sure and row["difference"] < 0]
    level = [row for row in rivals if row["name"] not in sure]
    cheaper = min(level, key=lambda row: row["cost"]["parameters_per_token"], default=None)
    if ahead:
        best = ahead[0]
        words = f"Fusing loses to {best['name']!r} by {fused['mean'] - best['mean']:.3f} nats per token"
        words += f" and to {len(ahead) - 1} more" if len(ahead) > 1 else ""
    else:
        words = "No rival is surely ahead of the fused model, at 5 % over all rivals together"
    if cheaper and cheaper["cost"]["parameters_per_token"] < fused["cost"]["parameters_per_token"]:
        words += f"; {cheaper['name']!r} is level with it and reads fewer parameters per token"
    return words + "."


def left_out(results: dict) -> list[str]:
    """Lists what could not be compared or measured, one sentence for each reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in results["left_out"].items():
        reasons.setdefault(reason, []).append(name)
    short = [f"{n} of {domain}" for domain, n in results["skipped"].items() if n]
    rows = [f"Rows too short to have tokens behind their prompt, left out: {', '.join(short)}."] if short else []
    return rows + [f"Left out: {', '.join(names)}. {reason}" for reason, names in reasons.items()]
