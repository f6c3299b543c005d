# ruff: noqa: E402
"""Fuses every causal family of the installed transformers, tiny, and says how each way to use it ends.

    python tests/families.py                     # goes on where it stopped
    python tests/families.py phi3 bloom --again  # these alone, anew
    python -m experiments.tables                 # docs/families.md, from the results

Every family is fused with itself, where the fused model must say what the family says alone, and with Llama. Each runs in
a process of its own with limits of time and memory. A line of a family says "right"; "refused" and the sentence; or which
uses are "as alone": the family without this project deviates there in the same way. Anything else is a fault, and the
command then ends with status 1. Writes `results/families.json`.
"""

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import traceback
import warnings
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    logging,
    set_seed,
)

import modeling_ultrafuser
from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM
from modeling_ultrafuser.plan_base_ultrafuser import BLOCKS
from tests.support.tiny import specialist
from tests.support.tiny_families import STEPS, NotTinyError, build, generate, prompt, said, unending
from ultrafuser.check.checks import judge
from ultrafuser.provenance import provenance, versions


RESULTS = Path(__file__).parents[1] / "results" / "families.json"
SECONDS, BYTES = 240, 6 << 30

# ---------------------------------------------------------------------------------------------- ways to use a model

# each returns what a model does, and what it must equal


def cached(model):
    return generate(model, prompt()), generate(model, prompt(), use_cache=False)


def left_padding(model):
    ids, mask = prompt(), torch.ones_like(prompt())
    ids[1, :5] = mask[1, :5] = 0
    batch = generate(model, ids, attention_mask=mask)
    short = generate(model, ids[1:, 5:])
    return batch, torch.cat([generate(model, ids[:1]), torch.cat([ids[1:, :5], short], dim=-1)])


def static_cache(model):
    return generate(model, prompt(), cache_implementation="static"), generate(model, prompt(), use_cache=False)


def beams(model):
    return generate(model, prompt(), num_beams=3), generate(model, prompt(), num_beams=3, use_cache=False)


def continued_cache(model):
    first = generate(model, prompt(1), return_dict_in_generate=True)
    longer = torch.cat([first.sequences, prompt(1, 4)], dim=-1)
    return generate(model, longer, past_key_values=first.past_key_values), generate(model, longer, use_cache=False)


@torch.no_grad()
def packed_rows(model):
    ids = prompt(1)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    together = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return together, torch.cat([model(input_ids=p, use_cache=False).logits for p in (ids[:, :7], ids[:, 7:])], dim=1)


def checkpointing(model):
    def gradients():
        set_seed(0)
        model.zero_grad()
        model(input_ids=prompt(), labels=prompt(), use_cache=False).loss.backward()
        return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])

    model.train()
    try:
        plain = gradients()
        model.gradient_checkpointing_enable()
        return gradients(), plain
    finally:
        with contextlib.suppress(ValueError):
            model.gradient_checkpointing_disable()
        model.zero_grad()
        model.eval()


@torch.no_grad()
def save_and_reload(model):
    return _both(_reloaded(model)), _both(model)


@torch.no_grad()
def had_back(model):
    back = [model.specialist(n) for n in model.config.specialist_names] if hasattr(model, "specialist") else [model]
    before = torch.cat([m(input_ids=prompt()).logits for m in getattr(model, "made_of", [model])])
    return torch.cat([_reloaded(m)(input_ids=prompt()).logits for m in back]), before


def generate_batch(model):
    prompts = [prompt(1, n)[0].tolist() for n in (12, 5, 9)]
    expected = [generate(model, torch.tensor([p]))[0, len(p) :] for p in prompts]
    config = GenerationConfig(max_new_tokens=STEPS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    attention = model.config._attn_implementation
    try:
        answers = model.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=small)
    finally:
        model.set_attn_implementation(attention)
    answers = [torch.tensor(a.generated_tokens) for a in answers.values()]
    if [len(a) for a in answers] != [STEPS] * 3:
        raise RuntimeError(f"tokens generated: {[len(a) for a in answers]}")
    return torch.stack(answers), torch.stack(expected)


def _both(model) -> torch.Tensor:
    """Logits, and tokens generated with a cache."""
    logits = model(input_ids=prompt()).logits
    return torch.cat([logits.flatten(), generate(unending(model), prompt()).flatten()])


def _reloaded(model):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return unending(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval())


USES = {
    **{"cached": cached, "left padding": left_padding, "static cache": static_cache, "beams": beams},
    **{"packed rows": packed_rows, "checkpointing": checkpointing, "continued cache": continued_cache},
    **{"save and reload": save_and_reload, "had back": had_back, "generate_batch": generate_batch},
}
# what these return has another shape for a fused model
OF_ANOTHER_SHAPE = {"checkpointing", "had back"}


# ---------------------------------------------------------------------------------------------- how they end


def by_us(error: BaseException) -> bool:
    """Whether an error is a sentence of this project."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).is_relative_to(Path(modeling_ultrafuser.__file__).parent) and isinstance(
        error, ValueError
    )


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether tokens are the same, and other numbers alike."""
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=1e-3, atol=2e-3 * max(1.0, b.abs().max().item()))


def run(use, model) -> tuple[str, torch.Tensor | None]:
    """How a use ends: "right", "differs", "refused: ..." or an error; and what the model did."""
    set_seed(0)
    try:
        actual, expected = use(model)
    except Exception as error:
        return ("refused: " * by_us(error)) + said(error), None
    if not actual.isfinite().all() or not expected.isfinite().all():
        return "numbers that are not finite", actual
    return ("right" if near(actual, expected) else "differs"), actual


def judged(fused: tuple, alone: tuple, same: bool) -> str:
    """A fused model's use, beside the specialist's alone.

    Args:
        fused: What `run` returns of the fused model.
        alone: The same of the specialist.
        same: Whether both must do the same: the family is fused with itself.
    """
    (ending, did), (its_ending, it_did) = fused, alone
    if ending == "right" and (its_ending != "right" or not same or near(did, it_did)):
        return "right"
    if ending.startswith("refused: "):
        return ending
    if ending == "right":
        return "wrong: is right by itself, and not what the specialist does alone"
    raises = [e not in ("differs", "numbers that are not finite") for e in (ending, its_ending)]
    if its_ending != "right" and raises[0] == raises[1]:
        return f"as alone: {its_ending}"
    return f"wrong: {ending}; alone: {its_ending}"


def fuse(parts: dict, stirred: bool) -> UltraFuserForCausalLM:
    fused = UltraFuserForCausalLM.from_specialists(parts)
    if stirred:
        set_seed(7)
        for parameter in fused.model.fusion_gate.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    fused.__dict__["made_of"] = list(parts.values())
    return unending(fused)


def check_says(family: str, model: PreTrainedModel) -> str:
    """What `ultrafuser check` says of two folders of it: "fits", "blocks: ..." or an error."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
        except Exception as error:
            return f"cannot be saved alone: {said(error)}"
        try:
            found = judge({"a": (folder, None), "b": (folder, None)})
        except Exception as error:
            return f"wrong: check ends in {said(error)}"
    blocks = [f.text for f in found.findings if f.status == BLOCKS]
    return f"blocks: {blocks[0]}" if blocks else "fits"


def outcomes(family: str) -> dict:
    """Everything of one family."""
    try:
        model = build(family, 0)
    except NotTinyError as error:
        return {"not tiny": str(error)}
    found = {"class": type(model).__name__, "check": check_says(family, model)}
    alone = {name: run(use, model) for name, use in USES.items()}
    for partner in ("itself", "Llama"):
        other = model if partner == "itself" else specialist("llama", layers=2)
        try:
            fused = fuse({"text": model, "code": other}, partner == "Llama")
        except Exception as error:
            found[partner] = ("refused: " if by_us(error) else "wrong: ") + said(error).removeprefix("ValueError: ")
            continue
        found[partner] = {
            name: judged(run(use, fused), alone[name], partner == "itself" and name not in OF_ANOTHER_SHAPE)
            for name, use in USES.items()
        }
    return found


def verdict(found: dict) -> str:
    """One line of what a family came to."""
    if "not tiny" in found:
        return f"not built: {found['not tiny']}"
    pairs = {p: found[p] if isinstance(found[p], dict) else {"fusing": found[p]} for p in ("itself", "Llama")}
    endings = {f"{use} with {pair}": ending for pair, its in pairs.items() for use, ending in its.items()}
    refused = found["itself"] if isinstance(found["itself"], str) else None
    if found["check"].startswith("wrong"):
        endings["check"] = found["check"]
    elif found["check"].startswith("blocks") and refused is None:
        endings["check"] = f"wrong: {found['check']}, and it can be fused"
    wrong = [f"{use}: {e.removeprefix('wrong: ')}" for use, e in endings.items() if e.startswith("wrong")]
    if wrong:
        return f"wrong: {'; '.join(wrong)}"
    if refused is not None:
        return refused
    kinds = {
        kind: sorted(
            {u if u.startswith("fusing") else u.split(" with ")[0] for u, e in endings.items() if e.startswith(kind)}
        )
        for kind in KINDS
    }
    return "; ".join(["right", *(f"{kind}: {', '.join(uses)}" for kind, uses in kinds.items() if uses)])


KINDS = ("as alone", "refused")


# ---------------------------------------------------------------------------------------------- the command


def in_a_process(family: str) -> dict:
    """`outcomes`, with limits of time and memory."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(family, send))
    process.start()
    send.close()
    try:
        found = receive.recv() if receive.poll(SECONDS) else {"not finished": f"after {SECONDS} s"}
    except EOFError:
        process.join()
        found = {"not finished": f"the process ended with status {process.exitcode}"}
    process.kill()
    process.join()
    if "not finished" in found:
        found = dict.fromkeys(("check", "itself", "Llama"), f"wrong: {found['not finished']}")
    return found


def _child(family: str, send) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        if not os.environ.get("SHOW"):
            os.dup2(nowhere.fileno(), 2)
    send.send(outcomes(family))


def main() -> int:
    """Runs what has no result yet. Returns 1 if any family is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types; default: all")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    table = json.loads(options.results.read_text()) if options.results.exists() else {"families": {}}
    if table.get("provenance", {}).get("versions") != versions():
        table = {"families": {}}
    about = {"command": "python tests/families.py", "date": datetime.date.today().isoformat()}
    table = {"provenance": provenance(), **about, "families": table["families"]}
    every = sorted({c.model_type for c in MODEL_FOR_CAUSAL_LM_MAPPING} - {UltraFuserConfig.model_type})
    for family in options.families or every:
        if family not in table["families"] or options.again:
            found = in_a_process(family)
            table["families"][family] = {"verdict": verdict(found), **found}
            table["families"] = dict(sorted(table["families"].items()))
            written = options.results.with_suffix(".part")
            written.write_text(json.dumps(table, indent=1) + "\n")
            written.replace(options.results)
        print(f"{family}: {table['families'][family]['verdict']}", flush=True)
    return any(f["verdict"].startswith("wrong") for f in table["families"].values())


if __name__ == "__main__":
    sys.exit(main())
