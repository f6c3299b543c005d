"""A fused model beside what one would use instead: `python -m benchmarks.rivals`.

Three specialists, as three LoRA adapters of one base that are merged into it for all but PEFT's own ways: every way
has the same three models to work with. Weights are random, adapters small, and heads scaled up, so that specialists
agree about as often as trained ones and are as sure of what they say; how far a round of drafts gets depends on that,
and is written below the times. Two shapes: one bound by the number of operations, one by reading the weights.

All ways continue one prompt greedily, by turns, in one process with one thread. What is said to compute the same must
give the same tokens before anything is timed; of the rest only the cost can be compared. Times are process CPU
seconds, and each number is the ratio to one specialist through `generate` in the same round. Rivals whose projects
write their own loop have it here in few words, without what `generate` does around a step: that favours them. A prompt
is what a first token takes, a token what each further one does. Writes `results/rivals.json`.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel, set_seed
from transformers.utils import logging

from benchmarks.decoding import SHAPES
from benchmarks.timing import compare_ways
from modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.decoding.compiling import compiled
from ultrafuser.decoding.drafting import self_draft
from ultrafuser.decoding.stacking import stack
from ultrafuser.provenance import provenance
from ultrafuser.quickstart.corpora import DOMAINS


RESULTS = Path(__file__).parent.parent / "results" / "rivals.json"
ONE, FUSED = "one specialist", "fused"
# tokens of the prompt and after it, rounds, and whether to compile, which gains nothing where weights are the limit
REGIMES = {
    "small": {"prompt": 64, "new": 24, "rounds": 5, "compile_steps": True},
    "large": {"prompt": 32, "new": 10, "rounds": 3, "compile_steps": False},
}
# no token ends a text, and larger weights than usual, or what a random model says would hardly depend on its input
SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.1}


class Row(NamedTuple):
    """One way: from a prompt and a number of tokens to the prompt with them."""

    way: Callable[[Tensor, int], Tensor]
    # whose weights it needs in memory
    models: list[nn.Module]
    # "logits" or "probabilities", what it averages; "" for what computes something else
    averages: str = ""


def main() -> None:
    """Measures, prints and writes both regimes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    result = {"provenance": provenance(), "regimes": REGIMES, "shapes": SHAPES}
    for name, settings in REGIMES.items():
        result[name] = measure_rivals(SHAPES[name], **settings)
        print(f"\n{name}\n\n{table(result[name])}", flush=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def measure_rivals(shape: dict[str, int], prompt: int, new: int, rounds: int, compile_steps: bool) -> dict[str, dict]:
    """Every way's cost relative to one specialist."""
    set_seed(0)
    ids = torch.randint(3, shape["vocab_size"], (1, prompt))
    with tempfile.TemporaryDirectory() as folder:
        rows = all_rows(shape, Path(folder), compile_steps)
    check_alike(rows, ids, 1 + new)
    found = compare_ways({name: lambda row=row: seconds(row.way, ids, new) for name, row in rows.items()}, rounds)
    one = weight_bytes(rows[ONE].models)
    for name, row in rows.items():
        found[name]["weights"] = round(weight_bytes(row.models) / one, 3)
        found[name]["same tokens as"] = row.averages and f"average of {row.averages}"
    found["fused, self-drafting"]["tokens in a round"] = tokens_in_a_round(rows["fused, self-drafting"], ids, new)
    return found


def all_rows(shape: dict[str, int], folder: Path, compile_steps: bool) -> dict[str, Row]:
    """One specialist, ours, then rivals."""
    base, adapted, specialists = related_models(shape)
    adapted.save_pretrained(folder)
    models = list(specialists.values())
    one, fused = models[0], UltraFuserForCausalLM.from_specialists(specialists)
    mixed = UltraFuserForCausalLM.from_specialists(specialists, fusion="probabilities")
    stacked, dense, moe = stack(fused), dense_model(shape, 1.5), experts(shape)
    adapters_in_layers, own = x_lora(base, folder), fused.specialist(DOMAINS[0])
    rows = {
        ONE: Row(generated(one), [one]),
        FUSED: Row(generated(fused), [fused], "logits"),
        "fused, stacked": Row(generated(stacked), [stacked], "logits"),
        "fused, self-drafting": Row(generated(fused, custom_generate=self_draft), [fused], "logits"),
        "fused, probabilities": Row(generated(mixed), [mixed], "probabilities"),
        "loop over models, logits averaged": Row(loop_of_logits(models), models, "logits"),
        "GaC: probabilities over the union of vocabularies": Row(gac(models), models, "probabilities"),
        "MoCo: logits averaged, all read again": Row(moco(models), models, "logits"),
        "PEFT, mixed adapters, logits averaged": Row(mixed_adapters(adapted), [adapted], "logits"),
        "PEFT, X-LoRA": Row(generated(adapters_in_layers), [adapters_in_layers]),
        **{f"MoE of the MLPs, {k} of 3": Row(routed(moe, k), [moe]) for k in (1, 2, 3)},
        "dense, three times the size": Row(generated(dense), [dense]),
        "assisted decoding, a specialist drafts": Row(generated(fused, assistant_model=own), [fused, own], "logits"),
        "assisted decoding, drafts mixed in (weight 0.5)": Row(
            generated(fused, assistant_model=own, assistant_ensemble_weight=0.5), [fused, own]
        ),
    }
    if compile_steps:
        rows["one specialist, compiled"] = Row(generated(one, **compiled()), [one])
        rows["fused, stacked, compiled"] = Row(generated(stacked, **compiled()), [stacked], "logits")
    return rows


def related_models(shape: dict[str, int]) -> tuple[PreTrainedModel, PeftModel, dict[str, PreTrainedModel]]:
    """A base, the same with three adapters, and each adapter merged into a copy."""
    base = dense_model(shape)
    # as sure of a token as trained models are, or stock assisted decoding would stop after each draft
    base.lm_head.weight *= 40
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"])
    adapted = get_peft_model(copy.deepcopy(base), config, DOMAINS[0])
    for domain in DOMAINS[1:]:
        adapted.add_adapter(domain, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            # low rank weighs the more the wider the matrix
            nn.init.normal_(parameter, std=0.07 * shape["hidden_size"] ** -0.25)
    merged = {}
    for domain in DOMAINS:
        own = copy.deepcopy(adapted)
        own.set_adapter(domain)
        merged[domain] = own.merge_and_unload().eval()
    return base, adapted.eval(), merged


def dense_model(shape: dict[str, int], wider: float = 1) -> PreTrainedModel:
    """One Llama; 1.5 times as wide it has 5/3 times the layers, and together three times the weights."""
    fields = {key: size if key == "vocab_size" else int(wider * size) for key, size in shape.items()}
    if wider > 1:
        fields["num_hidden_layers"] = round(shape["num_hidden_layers"] * 5 / 3)
    return LlamaForCausalLM(LlamaConfig(**fields, **SPECIAL)).eval()


def experts(shape: dict[str, int]) -> PreTrainedModel:
    """The layout that mergekit-moe gives three Llamas: a Mixtral with one's attention and embeddings, an MLP of each.

    "Equal active size" has two readings, and both are measured. With 1 expert of 3 a token meets as many weights as in
    one specialist; with all 3 it meets every MLP, as in the fused model. 2 is what mergekit-moe sets.
    """
    heads = {"num_key_value_heads": shape["num_attention_heads"], "num_local_experts": len(DOMAINS)}
    return MixtralForCausalLM(MixtralConfig(**shape, **heads, **SPECIAL)).eval()


def x_lora(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Loads PEFT's X-LoRA (Buehler and Buehler, 2024, arXiv 2402.07148) over the three adapters.

    A pass without adapters gives their weights, and a second pass mixes them in.
    """
    base = copy.deepcopy(base)
    base.config.use_cache = False  # PEFT asks for it: keys and values are those of neither pass
    # PEFT numbers adapters whatever they are called, and finds only those called by their number
    adapters = {str(k): str(folder / domain) for k, domain in enumerate(DOMAINS)}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, adapters=adapters)
    return get_peft_model(base, config).eval()


def generated(model: nn.Module, **options) -> Callable[[Tensor, int], Tensor]:
    """Generates with transformers' `generate`."""
    return lambda ids, new: model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **options
    )


def routed(moe: PreTrainedModel, count: int) -> Callable[[Tensor, int], Tensor]:
    """The same, with this many experts for each token."""

    def way(ids: Tensor, new: int) -> Tensor:
        for layer in moe.model.layers:
            layer.mlp.gate.top_k = count
        return generated(moe)(ids, new)

    return way


def loop_of_logits(models: list[PreTrainedModel]) -> Callable[[Tensor, int], Tensor]:
    """Writes the loop by hand: every model with its own cache, and logits averaged."""

    def way(ids: Tensor, new: int) -> Tensor:
        caches, unread = [None] * len(models), ids
        for _ in range(new):
            outputs = [m(unread, past_key_values=c, use_cache=True) for m, c in zip(models, caches, strict=True)]
            caches = [o.past_key_values for o in outputs]
            unread = sum(o.logits[:, -1] for o in outputs).div(len(models)).argmax(-1, keepdim=True)
            ids = torch.cat([ids, unread], dim=-1)
        return ids

    return way


def gac(models: list[PreTrainedModel]) -> Callable[[Tensor, int], Tensor]:
    """GaC (Yu et al., 2024, arXiv 2406.12585): each model's probabilities, brought into the union of vocabularies.

    A sparse matrix does it; of one shared vocabulary it is the identity. In GaC tokens go through text to reach the
    other tokenizers, which is left out here.
    """
    vocab = models[0].config.vocab_size
    places, ones = torch.arange(vocab).expand(2, -1), torch.ones(vocab)
    to_union = torch.sparse_coo_tensor(places, ones, (vocab, vocab), is_coalesced=True, check_invariants=False)

    def way(ids: Tensor, new: int) -> Tensor:
        caches, unread = [None] * len(models), ids
        for _ in range(new):
            shares = 0
            for k, model in enumerate(models):
                output = model(unread, past_key_values=caches[k], use_cache=True)
                caches[k] = output.past_key_values
                shares = shares + torch.sparse.mm(to_union, output.logits[:, -1].softmax(-1).T).T / len(models)
            unread = shares.argmax(-1, keepdim=True)
            ids = torch.cat([ids, unread], dim=-1)
        return ids

    return way


def moco(models: list[PreTrainedModel]) -> Callable[[Tensor, int], Tensor]:
    """MoCo's logit fusion (github.com/BunsenFeng/model_collaboration): all text read again for each token."""

    def way(ids: Tensor, new: int) -> Tensor:
        for _ in range(new):
            logits = [model(ids, attention_mask=torch.ones_like(ids)).logits[:, -1] for model in models]
            ids = torch.cat([ids, torch.stack(logits).mean(0).argmax(-1, keepdim=True)], dim=-1)
        return ids

    return way


def mixed_adapters(adapted: PeftModel) -> Callable[[Tensor, int], Tensor]:
    """PEFT's batches of several adapters: a row for each, one pass of the base, and the rows' logits averaged."""
    names = list(DOMAINS)

    def way(ids: Tensor, new: int) -> Tensor:
        cache, unread = None, ids
        for _ in range(new):
            rows = unread.expand(len(names), -1)
            output = adapted(
                input_ids=rows, adapter_names=names, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache, unread = output.past_key_values, output.logits[:, -1].mean(0, keepdim=True).argmax(-1, keepdim=True)
            ids = torch.cat([ids, unread], dim=-1)
        return ids

    return way


def check_alike(rows: dict[str, Row], ids: Tensor, new: int) -> None:
    """Runs every way once, and stops if those that average the same thing give other tokens."""
    said = {name: row.way(ids, new) for name, row in rows.items()}
    wanted = {"logits": said[FUSED], "probabilities": said["fused, probabilities"]}
    for name, row in rows.items():
        if row.averages and not torch.equal(said[name], wanted[row.averages]):
            raise RuntimeError(f"{name!r} should give the tokens of the average of {row.averages}, but gives others.")


def seconds(way: Callable[[Tensor, int], Tensor], ids: Tensor, new: int) -> dict[str, float]:
    """Process CPU seconds of the prompt with one token, and of each token after that."""
    start = time.process_time()
    way(ids, 1)
    first = time.process_time() - start
    way(ids, 1 + new)
    return {"prompt": first, "token": (time.process_time() - start - 2 * first) / new}


def weight_bytes(models: list[nn.Module]) -> int:
    """Bytes of all weights, those that several models share once."""
    storages = [p.untyped_storage() for model in models for p in model.parameters()]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def tokens_in_a_round(drafting: Row, ids: Tensor, new: int) -> float:
    """Counts the tokens of a round of self-drafting. The gate weighs the prompt first, then each round."""
    calls = []
    hook = drafting.models[0].model.fusion_gate.register_forward_hook(lambda *_: calls.append(1))
    drafting.way(ids, 1 + new)
    hook.remove()
    return round(new / (len(calls) - 1), 2)


def table(found: dict[str, dict]) -> str:
    """Markdown of one regime."""
    lines = ["|  | each token | prompt | weights | same tokens as |", "|---|---:|---:|---:|---|"]
    for name, row in found.items():
        times = " | ".join("{median:.2f} ({least:.2f} to {most:.2f})".format(**row[q]) for q in ("token", "prompt"))
        lines.append(f"| {name} | {times} | {row['weights']:.2f} | {row['same tokens as']} |")
    drafting = found["fused, self-drafting"]["tokens in a round"]
    return "\n".join([*lines, "", f"A round of self-drafting yields {drafting} tokens here."])


if __name__ == "__main__":
    main()
