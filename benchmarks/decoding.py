"""Measures decoding with a fused model, beside one specialist: `python -m benchmarks.decoding QUICKSTART/fused`.

Times are process CPU seconds of one thread. Ways to be compared take turns within each round, and every number is the
ratio to one specialist in the same round: the median over rounds, with the smallest and the largest. Fused ways must give
the same greedy tokens first. What depends on what the models say (tokens, acceptance) is measured with the quickstart's
trained models, what depends on size alone with random weights. Writes `results/decoding.json`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, StaticCache, set_seed
from transformers.utils import logging

from benchmarks.timing import ratios, spread, take_turns
from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM
from ultrafuser.decoding.compiling import compiled
from ultrafuser.decoding.drafting import self_draft
from ultrafuser.decoding.stacking import stack
from ultrafuser.provenance import provenance
from ultrafuser.quickstart.corpora import DOMAINS, documents, splits


RESULTS = Path(__file__).parent.parent / "results" / "decoding.json"
SHAPES = {
    # bound by the number of operations
    "small": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "intermediate_size": 192,
        "num_hidden_layers": 8,
        "vocab_size": 1024,
    },
    # bound by reading the weights: 81 million parameters each
    "large": {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 2304,
        "num_hidden_layers": 8,
        "vocab_size": 16384,
    },
}
CONTEXT, STEPS, PROMPT, NEW = 32, 12, 128, 96
BLOCKS = (2, 4, 6, 8, 12)
Ways = dict[str, Callable[[], float]]


def main() -> None:
    """Measures, prints and writes every table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fused", type=Path, help="folder of the fused model that `ultrafuser quickstart` made")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(0)

    result = {"provenance": provenance(), "rounds": options.rounds, "shapes": SHAPES}
    trained, prompts = UltraFuserForCausalLM.from_pretrained(options.fused).eval(), held_out_prompts(options.fused)
    trained.generation_config.eos_token_id = None
    small, large = random_model(**SHAPES["small"]), random_model(**SHAPES["large"])
    tables = {
        "passes per token, quickstart's models": lambda: passes_per_token(trained, prompts),
        "step, small": lambda: compare_decoding(step_ways(small, compile_steps=True), options.rounds),
        "end to end, quickstart's models": lambda: compare_decoding(
            text_ways(trained, prompts), max(3, options.rounds // 3)
        ),
        "step, large": lambda: compare_decoding(step_ways(large), options.rounds),
        "checking a block, large": lambda: compare_decoding(block_ways(large), options.rounds),
        "prompt, large": lambda: compare_decoding(prompt_ways(large), max(3, options.rounds // 2)),
    }
    for name, measure in tables.items():
        result[name] = measure()
        print(f"\n{name}")
        for way, numbers in result[name].items():
            print(f"  {way}: {numbers}", flush=True)
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")


def compare_decoding(ways: Ways, rounds: int) -> dict[str, dict[str, float]]:
    """Each way's time over the first's, round by round."""
    for run in ways.values():
        run()
    times = take_turns(ways, rounds)
    first = next(iter(ways))
    table = {name: spread(ratios(seconds, times[first])) for name, seconds in times.items()}
    table[first]["milliseconds"] = round(1000 * statistics.median(times[first]), 3)
    return table


def step_ways(fused: UltraFuserForCausalLM, compile_steps: bool = False) -> Ways:
    """One token each, at a context of a few dozen."""
    stacked, one = stack(fused), fused.specialist("text")
    ids = torch.randint(3, 1000, (1, CONTEXT + STEPS))
    check_alike(fused(ids).logits[:, -1:], stacked(ids).logits[:, -1:])
    ways = {
        "one specialist": lambda: steps(one, one, ids),
        "fused": lambda: steps(fused, fused, ids),
        "fused, stacked": lambda: steps(stacked, stacked, ids),
    }
    if compile_steps:
        for name, model in (("fused, stacked, compiled", stacked), ("one specialist, compiled", one)):
            # what `compiled(cpp_wrapper=True)` asks for
            call = torch.compile(model.forward, fullgraph=True, dynamic=False, options={"cpp_wrapper": True})
            check_alike(
                fused(ids).logits[:, -1:] if model is stacked else one(ids).logits[:, -1:], last(model, call, ids)
            )
            ways[name] = lambda model=model, call=call: steps(model, call, ids, static=True)
    return ways


def steps(model, call: Callable, ids: Tensor, static: bool = False) -> float:
    """Seconds for a step, once the context is in the cache."""
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT + STEPS) if static else None
    cache = model(ids[:, :CONTEXT], past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    start = time.process_time()
    for i in range(CONTEXT, CONTEXT + STEPS):
        call(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
    return (time.process_time() - start) / STEPS


def last(model, call: Callable, ids: Tensor) -> Tensor:
    """Computes the logits after the text, which is read one token at a time after the context."""
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT + STEPS)
    model(ids[:, :CONTEXT], past_key_values=cache, use_cache=True)
    return [
        call(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(CONTEXT, len(ids[0]))
    ][-1]


def text_ways(fused: UltraFuserForCausalLM, prompts: dict[str, list[Tensor]]) -> Ways:
    """A text of each domain through `generate`: its own specialist, and every fused way."""
    stacked = stack(fused)
    specialists = {domain: fused.specialist(domain) for domain in prompts}
    for specialist in specialists.values():
        specialist.generation_config.eos_token_id = None
    options = {
        "one specialist": lambda domain: (specialists[domain], {}),
        "fused": lambda domain: (fused, {}),
        "fused, stacked": lambda domain: (stacked, {}),
        "fused, stacked, compiled": lambda domain: (stacked, compiled(cpp_wrapper=True)),
        "fused, self-drafting": lambda domain: (fused, {"custom_generate": self_draft}),
        "fused, a specialist as assistant": lambda domain: (fused, {"assistant_model": specialists[domain]}),
        "fused, prompt lookup": lambda domain: (fused, {"prompt_lookup_num_tokens": 5}),
        "fused, stacked, prompt lookup": lambda domain: (stacked, {"prompt_lookup_num_tokens": 5}),
    }

    def texts(way: Callable) -> list[Tensor]:
        found = []
        for domain, (ids, *_) in prompts.items():
            model, how = way(domain)
            found.append(model.generate(ids, max_new_tokens=NEW, do_sample=False, **how))
        return found

    expected = texts(options["fused"])
    for name, way in options.items():
        if name != "one specialist" and not all(map(torch.equal, texts(way), expected)):
            raise RuntimeError(f"{name} gives other tokens than the plain way.")

    def seconds(way: Callable) -> float:
        start = time.process_time()
        texts(way)
        return (time.process_time() - start) / (NEW * len(prompts))

    return {name: lambda way=way: seconds(way) for name, way in options.items()}


def passes_per_token(fused: UltraFuserForCausalLM, prompts: dict[str, list[Tensor]]) -> dict[str, dict[str, float]]:
    """Specialists' passes after the prompt was read, for each token after the first."""
    lookup, drafting = {"prompt_lookup_num_tokens": 5}, {"custom_generate": self_draft}
    ways = {"plain": (DOMAINS, {}), "prompt lookup": (DOMAINS, lookup), "self-drafting": (DOMAINS, drafting)}
    ways |= {f"self-drafting, {domain}": ([domain], drafting) for domain in DOMAINS}
    plain = {d: [fused.generate(ids, max_new_tokens=NEW, do_sample=False) for ids in prompts[d]] for d in DOMAINS}
    table = {}
    for name, (domains, options) in ways.items():
        own, expected = ([ids for domain in domains for ids in texts[domain]] for texts in (prompts, plain))
        with counted(fused) as calls:
            texts = [fused.generate(ids, max_new_tokens=NEW, do_sample=False, **options) for ids in own]
        if not all(map(torch.equal, texts, expected)):
            raise RuntimeError(f"{name} gives other tokens than the plain way.")
        tokens, rounds = len(own) * (NEW - 1), calls.pop("gate") - len(own)
        after = sum(calls.values()) - len(own) * len(calls)
        found = {"passes": after / tokens, "tokens in a round": tokens / rounds}
        table[name] = {key: round(value, 3) for key, value in found.items()}
    return table


@contextmanager
def counted(fused: UltraFuserForCausalLM) -> Iterator[dict[str, int]]:
    """Counts how often each specialist and the gate run meanwhile."""
    modules = {**fused.model.specialists, "gate": fused.model.fusion_gate}
    calls = dict.fromkeys(modules, 0)

    def count(name: str) -> Callable:
        return lambda *_: calls.update({name: calls[name] + 1})

    hooks = [module.register_forward_hook(count(name)) for name, module in modules.items()]
    yield calls
    for hook in hooks:
        hook.remove()


def block_ways(fused: UltraFuserForCausalLM) -> Ways:
    """Measures a round of self-drafting without its drafts: the other two specialists, the gate and the head."""
    one, ids = fused.specialist("text"), torch.randint(3, 1000, (1, CONTEXT + STEPS))
    backbones = list(fused.model.specialists.values())

    def seconds(count: int) -> float:
        caches = [m(ids[:, :CONTEXT], use_cache=True).past_key_values for m in backbones]
        block = ids[:, CONTEXT : CONTEXT + count]
        drafted = backbones[0](block, past_key_values=caches[0], use_cache=True).last_hidden_state
        start = time.process_time()
        others = zip(backbones[1:], caches[1:], strict=True)
        hidden = [m(block, past_key_values=cache, use_cache=True).last_hidden_state for m, cache in others]
        states, (weights, _) = fused.model.weighed([drafted, *hidden])
        fused.logits(states, weights)
        return time.process_time() - start

    ways = {"one specialist's step": lambda: steps(one, one, ids)}
    return ways | {f"block of {n}": lambda n=n: seconds(n) for n in BLOCKS}


def prompt_ways(fused: UltraFuserForCausalLM) -> Ways:
    """Reading a prompt and saying the next token."""
    stacked, one, ids = stack(fused), fused.specialist("text"), torch.randint(3, 1000, (1, PROMPT))
    specialists = [fused.specialist(name) for name in fused.config.specialist_names]

    def timed(read: Callable) -> Callable[[], float]:
        def seconds() -> float:
            start = time.process_time()
            read()
            return time.process_time() - start

        return seconds

    return {
        "one specialist, last position": timed(lambda: one(ids, logits_to_keep=1)),
        "fused, last position": timed(lambda: fused(ids, logits_to_keep=1)),
        "fused, stacked, last position": timed(lambda: stacked(ids, logits_to_keep=1)),
        "loop over specialists, all positions": timed(lambda: sum(model(ids).logits for model in specialists) / 3),
    }


def random_model(**shape: int) -> UltraFuserForCausalLM:
    """Three Llamas of random weights, fused."""
    specialist = LlamaConfig(**shape)
    fused = UltraFuserForCausalLM(UltraFuserConfig(specialist_names=list(DOMAINS), specialists=[specialist] * 3))
    fused.generation_config.eos_token_id = None
    return fused.eval()


def held_out_prompts(folder: Path, each: int = 10, length: int = 32) -> dict[str, list[Tensor]]:
    """Pieces of documents that no specialist was made from.

    Their second tokens, `length` of them: on the first ones it was tried how the number of drafts should grow.
    """
    tokenizer, prompts = AutoTokenizer.from_pretrained(folder), {}
    for domain in DOMAINS:
        texts = [tokenizer(t, return_tensors="pt").input_ids for t in splits(documents(domain))["held_out"]]
        prompts[domain] = [ids[:, length : 2 * length] for ids in texts if ids.shape[1] >= 2 * length][:each]
    return prompts


def check_alike(expected: Tensor, actual: Tensor) -> None:
    """Stops before anything is measured that does not say the same."""
    torch.testing.assert_close(actual[:, -1], expected[:, -1], rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    main()
