"""Who is compared: the fused model, its specialists, and all that a sceptic would make of the same specialists."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from tempfile import TemporaryDirectory

import sklearn  # noqa: F401  the router needs it after an hour, and it may not be installed
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.fusions_ultrafuser import FUSIONS
from trainers import CachedGateTrainer, GateStageConfig

from ..build.specialist_edits import remove_specialist
from ..merge import MERGES, merge_method
from ..merge.layer_inputs import inner_products
from ..merge.merged_model import lines_start, merge
from ..route.router_training import measured, prompts_of
from ..route.router_words import WordsRouter
from . import baselines
from .measurement import HeldOut, Scores, cost, mean_loss, score


FUSED = "fused"
# how a gate that predicts temperatures is tuned
TEMPERATURES = {
    "constant": {"learning_rate": 1e-2},
    "cross": {"learning_rate": 3e-3, "gate_dropout": 0.1, "weight_decay": 0.1, "max_steps": 200},
}


class UntunedError(ValueError):
    """A contender that cannot be made of this model, or that has to be tuned, and there is nothing to tune it with."""


@dataclass
class Measured:
    """Result of one contender: its scores by domain, its cost, and how it was made where that needs saying."""

    kind: str
    scores: dict[str, Scores]
    cost: dict[str, float]
    note: str = ""


@dataclass
class Comparison:
    """Models and data that every contender is made of and measured on.

    Attributes:
        fused: The fused model.
        ingredients: The fused model whose specialists are as they came: another one if `fused` went through stage two.
        tokenizer: Of both.
        data: Held-out examples by domain.
        tune: Other examples by domain, to tune baselines with. May be empty.
        base: What all specialists were tuned from, if anything.
        seed: Of everything random.
        found: What was measured so far, by name.
        costs: Costs of ordinary models, by the shapes of their parameters.
    """

    fused: UltraFuserForCausalLM
    ingredients: UltraFuserForCausalLM
    tokenizer: PreTrainedTokenizerBase
    data: Mapping[str, HeldOut]
    tune: Mapping[str, HeldOut]
    base: PreTrainedModel | None = None
    seed: int = 0
    found: dict[str, Measured] = field(default_factory=dict)
    costs: dict[tuple, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self):
        names = self.ingredients.config.specialist_names
        self.specialists = {name: self.ingredients.specialist(name) for name in names}

    def run(
        self,
        model: PreTrainedModel,
        kind: str,
        before: Callable[[str, slice], dict | None] = lambda *_: None,
        note: str = "",
    ) -> Measured:
        """Measures a model on every domain, and what it costs.

        Args:
            model: Any causal language model.
            kind: What it is, for the table.
            before: Called with the domain and the rows of each batch before it is run. Returns further inputs of the model, if
                any.
            note: How it was made.
        """
        scores = {d: score(model, examples, before=partial(before, d)) for d, examples in self.data.items()}
        domain, examples = next(iter(self.data.items()))
        before(domain, slice(0, 1))
        return Measured(kind, scores, self._cost(model, examples.input_ids[:1, :16]), note)

    def _cost(self, model: PreTrainedModel, prompt: Tensor) -> dict[str, float]:
        """Returns what a model costs. Ordinary models of one shape, as merges are, cost the same: one of them is timed."""
        reference = next(iter(self.specialists.values()))
        if isinstance(model, UltraFuserForCausalLM):
            return cost(model, reference, prompt)
        shape = (type(model), *((p.shape, p.dtype, p.device) for p in model.parameters()))
        if shape not in self.costs:
            self.costs[shape] = cost(model, reference, prompt)
        return {**self.costs[shape]}

    def alone(self, domain: str) -> dict[str, Scores]:
        """Returns the scores of each specialist alone on a domain."""
        return {name: self.found[f"{name} specialist"].scores[domain] for name in self.specialists}


def contenders(comparison: Comparison) -> dict[str, Callable[[], Measured]]:
    """Returns a function that measures each contender, in an order in which each finds what it builds on."""
    run, ingredients = comparison.run, comparison.ingredients
    plan = {f"{n} specialist": partial(run, s, "specialist") for n, s in comparison.specialists.items()}
    plan[FUSED] = partial(run, comparison.fused, "fused")
    names = comparison.fused.config.specialist_names
    plan |= {f"{FUSED} without {name}": partial(without, comparison, name) for name in names if len(names) > 2}
    for fusion in (name for name, rule in FUSIONS.items() if rule.has_loss):
        plan[f"uniform {fusion}"] = partial(run, baselines.ensemble(ingredients, "uniform", fusion), "ensemble")
    random_gate = baselines.RandomGate(ingredients.config, comparison.seed)
    plan["random gate"] = partial(run, baselines.ensemble(ingredients, random_gate), "control")
    plan["shuffled gate"] = partial(shuffled, comparison)
    plan["gate by token"] = partial(looked_up, comparison)
    plan["best specialist per domain (oracle)"] = partial(routed, comparison, best_per_domain)
    plan["best specialist per request (oracle)"] = partial(routed, comparison, best_per_request)
    for temperature, gates in (("one temperature", ["constant"]), ("a temperature per token", ["constant", "cross"])):
        name = f"best specialist per domain (oracle), {temperature}"
        plan[name] = partial(calibrated_oracle, comparison, gates)
    forecaster = baselines.ensemble(ingredients, "posterior", "probabilities")
    plan["fixed-share forecaster"] = partial(run, forecaster, "ensemble")
    plan["router: prompt perplexity"] = partial(routed, comparison, least_perplexed)
    alike = baselines.ensemble(ingredients, "uniform")
    plan["prompt perplexity weights (PackLLM)"] = partial(weighted_by_perplexity, comparison, alike)
    plan[f"{FUSED}, prompt perplexity as prior"] = partial(weighted_by_perplexity, comparison, comparison.fused)
    plan["tuned constant weights"] = partial(tuned_constant, comparison)
    plan["router: trained"] = lambda: routed(comparison, trained_choice(comparison))
    for method, kind in MERGES.items():
        for lines in (False, True) if kind.scales else (False,):
            name = f"merge: {method.replace('_', ' ')}{' + LiNeS' if lines else ''}"
            plan[name] = partial(merged, comparison, method, lines)
    return plan


def without(comparison: Comparison, name: str) -> Measured:
    """The fused model without one of its specialists, whose gate is not trained again.

    Raises:
        UntunedError: If the gate cannot keep what it learned.
    """
    try:
        model = remove_specialist(comparison.fused, name)
    except ValueError as error:
        raise UntunedError(str(error)) from error
    return comparison.run(model, "pruned")


def shuffled(comparison: Comparison) -> Measured:
    """The fused model, with its gate's weights at the wrong tokens."""
    model = comparison.fused
    gate = baselines.ShuffledGate(model.config, model.model.fusion_gate, comparison.seed)

    def set_lengths(domain: str, rows: slice) -> None:
        gate.lengths = comparison.data[domain].attention_mask[rows].sum(-1)

    return comparison.run(baselines.ensemble(model, gate, model.config.fusion), "control", set_lengths)


def looked_up(comparison: Comparison) -> Measured:
    """The fused model, whose gate knows the token that is read and nothing before it: its means over the tuning examples.

    How much of a gate is a table of the vocabulary, as routing by word is (Roller et al., 2021, arXiv 2106.04426).

    Raises:
        UntunedError: If there are none.
    """
    _check_tunable(comparison)
    gate = baselines.by_token(comparison.fused, comparison.tune.values())
    return comparison.run(baselines.ensemble(comparison.fused, gate, comparison.fused.config.fusion), "control")


def routed(comparison: Comparison, choose: Callable[[dict[str, Scores], HeldOut], Tensor]) -> Measured:
    """One specialist per request: all are held, one is read per token.

    Args:
        comparison: The specialists' scores among others.
        choose: From the specialists' scores and the examples to the specialist of each. Shape (examples,).
    """
    scores = {}
    for domain, examples in comparison.data.items():
        own = comparison.alone(domain)
        scores[domain] = baselines.select(own, choose(own, examples))
    costs = [comparison.found[f"{name} specialist"].cost for name in comparison.specialists]
    price = {key: sum(c[key] for c in costs) for key in ("parameters", "bytes")}
    price |= {key: max(c[key] for c in costs) for key in ("parameters_per_token", "cache_bytes_per_token")}
    price |= {key: min(c[key] for c in costs) for key in ("tokens_per_second", "speed")}
    return Measured("router", scores, price)


def best_per_domain(specialists: dict[str, Scores], data: HeldOut) -> Tensor:
    """The specialist with the least loss on all responses, which only an oracle knows. Shape (examples,)."""
    return baselines.response_losses(specialists, data).sum(0).argmin().expand(len(data))


def best_per_request(specialists: dict[str, Scores], data: HeldOut) -> Tensor:
    """The specialist with the least loss on each response, which only an oracle knows. Shape (examples,)."""
    return baselines.response_losses(specialists, data).argmin(-1)


def least_perplexed(specialists: dict[str, Scores], data: HeldOut) -> Tensor:
    """The specialist with the least loss on each prompt. Shape (examples,)."""
    return baselines.prompt_losses(specialists, data).argmin(-1)


def trained_choice(comparison: Comparison) -> Callable[[dict[str, Scores], HeldOut], Tensor]:
    """A router that learnt from the tuning examples which specialist answers what prompt best.

    Raises:
        UntunedError: If there are none.
    """
    _check_tunable(comparison)
    found = measured(comparison.ingredients, comparison.tokenizer, comparison.tune)
    router = WordsRouter.trained(found, {})

    def choose(_: dict[str, Scores], examples: HeldOut) -> Tensor:
        prompts = prompts_of(comparison.ingredients, comparison.tokenizer, examples)
        return torch.cat([router.prior(batch).argmax(-1) for batch in prompts])

    return choose


def weighted_by_perplexity(comparison: Comparison, model: UltraFuserForCausalLM) -> Measured:
    """A model whose specialists are weighed for the whole request by how well each predicts its prompt.

    Raises:
        UntunedError: If its weights are signed.
    """
    if model.config.signed_weights is not None:
        raise UntunedError("A prior multiplies shares that sum to 1, but this model's weights are signed.")
    weights = {
        d: baselines.perplexity_weights(comparison.alone(d), examples) for d, examples in comparison.data.items()
    }

    def prior(domain: str, rows: slice) -> dict[str, Tensor]:
        return {"gate_prior": weights[domain][rows].to(model.device)}

    return comparison.run(model, "router", prior)


def tuned_constant(comparison: Comparison) -> Measured:
    """One weight per specialist for all tokens, tuned by stage one's own trainer on the tuning examples.

    Raises:
        UntunedError: If there are none.
    """
    _check_tunable(comparison)
    model = baselines.ensemble(comparison.ingredients, "constant")
    # adam moves a number by about the rate at each step: far enough to leave all to one specialist
    _tune(model, comparison, comparison.tune, learning_rate=5e-2)
    weights = model.model.fusion_gate.logits.softmax(-1).tolist()
    names = comparison.ingredients.config.specialist_names
    note = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(names, weights, strict=True))
    return comparison.run(model.eval(), "ensemble", note=note)


def calibrated_oracle(comparison: Comparison, gates: Sequence[str]) -> Measured:
    """The best specialist per domain, with temperatures tuned on that domain: what calibration alone is worth.

    Each gate is trained on three quarters of the domain's tuning examples; the last quarter says which is taken. A domain
    without tuning examples, such as mixed ones, is tuned for on all.

    Args:
        comparison: The specialists' scores among others.
        gates: "constant" for one temperature, "cross" for one per token.

    Raises:
        UntunedError: If there are no tuning examples.
    """
    _check_tunable(comparison)
    found = routed(comparison, best_per_domain)
    for domain, examples in comparison.data.items():
        best = int(best_per_domain(comparison.alone(domain), examples)[0])
        tune = {domain: comparison.tune[domain]} if domain in comparison.tune else comparison.tune
        models = [baselines.tempered(comparison.ingredients, gate, best) for gate in gates]
        for gate, model in zip(gates, models, strict=True):
            _tune(model, comparison, {d: e[: _fitted(e)] for d, e in tune.items()}, **TEMPERATURES[gate])
        rest = [e[_fitted(e) :] if len(e) > 1 else e for e in tune.values()]
        found.scores[domain] = score(min(models, key=lambda m: _loss(m.eval(), rest)), examples)
    return found


def _fitted(examples: HeldOut) -> int:
    """Counts the examples that temperatures are fitted on: three quarters, at least one."""
    return max(len(examples) * 3 // 4, 1)


def _tune(model: UltraFuserForCausalLM, comparison: Comparison, tune: Mapping[str, HeldOut], **settings) -> None:
    """Trains a model's gate on tuning examples, on what its specialists said once."""
    data = {domain: Dataset.from_list(examples.as_rows()) for domain, examples in tune.items()}
    with TemporaryDirectory() as folder:
        arguments = GateStageConfig(
            folder,
            examples_per_domain=4,
            per_device_train_batch_size=4 * len(data),
            max_length=None,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=model.dtype == torch.bfloat16,
            # where the model is
            use_cpu=model.device.type == "cpu",
            seed=comparison.seed,
            # no prior on temperatures: those that a lone specialist has are to be as good as they can be
            gate_scale=0.0,
            **{"max_steps": 60, "mixed_share": 0.0, "gate_dropout": 0.0, "weight_decay": 0.0, **settings},
        )
        CachedGateTrainer(
            model, arguments, data, processing_class=comparison.tokenizer, cache=f"{folder}/cache", keep="hidden"
        ).train()


def merged(comparison: Comparison, method: str, lines: bool) -> Measured:
    """A weight merge; where there are tuning examples, with the best of three factors of the changes, or slopes of LiNeS."""
    third = 1 / len(comparison.specialists)
    chosen = merge_method(method)
    # what averages on its own needs no factor; sums of changes without a smaller one go far beyond any specialist
    best = third if lines else chosen.default(len(comparison.specialists))
    options = {"base": comparison.base, "seed": comparison.seed}
    if chosen.reads_inputs:
        options["inputs"] = _layer_inputs(comparison)
    if lines:
        options["weight"] = lines_start(comparison.specialists, method, **options)
    varied = "slope" if lines else "weight"
    make = partial(merge, comparison.specialists, method, **options)
    if comparison.tune and (chosen.needs_base or lines):
        few = [examples[:16] for examples in comparison.tune.values()]
        # a merge is a copy of a specialist: one is held at a time, and the best is made again
        best = min((third, 0.5, 1.0), key=lambda w: _loss(make(**{varied: w}), few))
    factor = f"factor {options['weight']:.2g}, slope {best:.2g}" if lines else f"factor {best:.2g}" * chosen.scales
    return comparison.run(make(**{varied: best}), "merge", note=", ".join(filter(None, (factor, str(chosen)))))


def _layer_inputs(comparison: Comparison) -> dict[str, dict[str, Tensor]]:
    """Reads each specialist's layers' inputs on the tuning examples of the domain that is called after it.

    Raises:
        UntunedError: If there are none of one.
    """
    _check_tunable(comparison)
    if missing := sorted(set(comparison.specialists) - set(comparison.tune)):
        raise UntunedError(
            f"It reads rows of each specialist's own domain, but --tune has no domain called {missing}."
        )
    return {name: inner_products(model, comparison.tune[name]) for name, model in comparison.specialists.items()}


def _loss(model: PreTrainedModel, domains: list[HeldOut]) -> float:
    return sum(mean_loss(model, examples) for examples in domains)


def _check_tunable(comparison: Comparison) -> None:
    if not comparison.tune:
        raise UntunedError("It is tuned, but there are no examples to tune it with. Pass other data with --tune.")
