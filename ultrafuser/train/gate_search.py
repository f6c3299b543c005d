"""Compares several gates, trained on one cache of the specialists' states, on held-out rows."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.table import Column, Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, set_seed
from transformers.trainer_utils import SaveStrategy
from trl import ModelConfig

from modeling_ultrafuser.gate_base_ultrafuser import Reads
from modeling_ultrafuser.gates_ultrafuser import GATES, gate_settings
from trainers import CachedGateTrainer, GateStageConfig
from trainers.domain_trainer import data_seed
from trainers.domains import by_domain, split
from trainers.progress import ProgressOfTraining

from ..atomic import new_folder
from ..evaluation.measurement import held_out, mean_loss
from ..pretrained import save_fused
from .stage_recipe import FusedArguments, check_model, ingredients_of, load_domains, load_model


HELD_OUT = 0.1  # of each domain's rows
UNTRAINED = "uniform"


@dataclass
class Fit:
    """A gate, trained.

    Attributes:
        gate: As it was asked for, such as "mlp:64".
        seed: Of its first weights and of the draws.
        parameters: How many it has.
        seconds: Its training took, without the specialists' pass over the data.
        losses: Nats per token by domain, on held-out rows.
    """

    gate: str
    seed: int
    parameters: int
    seconds: float
    losses: dict[str, float]

    @property
    def mean(self) -> float:
        """Over domains."""
        return sum(self.losses.values()) / len(self.losses)


def compare_gates(
    fused: FusedArguments,
    args: GateStageConfig,
    model_args: ModelConfig,
    gates: list[str],
    *,
    seeds: int = 1,
    say: Callable[[str], None] = print,
) -> list[Fit]:
    """Trains gates on one cache, beside the uniform one, which has nothing to train, and saves the best one's model.

    Args:
        fused: What to train them in, and on which data. `cache` is the folder of what the specialists say: by default
            beside the output folder, and kept, so that more gates cost no second pass.
        args: Settings of stage one, for all of them. The best one's model is written to `output_dir`.
        model_args: The model's folder, its dtype.
        gates: See `gate_settings`: ["mlp:512", "cross:128+calibration", "linear", "posterior"].
        seeds: How often each is trained, with first weights and draws of its own.
        say: Called with a line about each.

    Returns:
        The best first.

    Raises:
        ValueError: If a gate is unknown, or a domain has too few rows to hold some out.
        FileExistsError: If there is something in the output folder.
    """
    check_model(fused, model_args)
    kinds = {gate: gate_settings(gate) for gate in (UNTRAINED, *gates)}
    # first those that read more: a cache made for them serves all
    kinds = dict(sorted(kinds.items(), key=lambda kind: Reads.PAST not in GATES[kind[1]["gate"]].reads))
    data, kept_back = split(by_domain(load_domains(fused, args.dataset_text_field)), HELD_OUT, args.seed)
    out, fits = Path(args.output_dir), []
    cache = fused.cache or out.with_name(f"{out.name}-cache")
    # what serves those that predict temperatures serves all
    keep = fused.cache_keep or ("hidden" if any(kind["gate_calibration"] for kind in kinds.values()) else None)
    with new_folder(out) as folder:
        for gate, seed in [(g, s) for g in kinds for s in range(seeds)]:
            model, tokenizer = load_model(fused, model_args, trust_remote_code=args.trust_remote_code)
            tests = {d: held_out(list(r), tokenizer, max_length=args.max_length) for d, r in kept_back.items()}
            _replace_gate(model, kinds[gate], seed)
            seconds = 0.0
            if _parameters(model):
                seconds = _trained(model, tokenizer, args, data, seed=seed, cache=cache, keep=keep)
            elif seed:
                continue
            losses = {d: mean_loss(model, test) for d, test in tests.items()}
            fit = Fit(gate, seed, _parameters(model), seconds, losses)
            say(f"{gate}, seed {seed}: {fit.mean:.4f} nats per token")
            if fit.mean < min((f.mean for f in fits), default=float("inf")):
                # over the last best one's
                save_fused(folder, model, tokenizer, ingredients_of(fused, model_args))
            fits.append(fit)
    return sorted(fits, key=lambda fit: fit.mean)


def table(fits: list[Fit]) -> Table:
    """All gates, the best first."""
    # a word that is cut cannot be copied into the next command
    gate = Column("gate", no_wrap=True, min_width=max(len(fit.gate) for fit in fits))
    shown = Table(gate, "seed", "parameters", "seconds", *fits[0].losses, "mean", caption="nats per token, held out")
    for fit in fits:
        losses = (f"{loss:.4f}" for loss in (*fit.losses.values(), fit.mean))
        shown.add_row(fit.gate, str(fit.seed), f"{fit.parameters:,}", f"{fit.seconds:.1f}", *losses)
    return shown


def _replace_gate(model: PreTrainedModel, settings: dict, seed: int) -> None:
    for field, value in settings.items():
        setattr(model.config, field, value)
    set_seed(seed)
    gate = GATES[model.config.gate](model.config)
    gate.init_weights()
    model.model.fusion_gate = gate.to(model.device)


def _parameters(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.model.fusion_gate.parameters())


def _trained(model, tokenizer: PreTrainedTokenizerBase, args: GateStageConfig, data, *, seed: int, **cache) -> float:
    """Trains the gate. Returns the seconds that it took without the pass."""
    own = copy.deepcopy(args)
    # mixed examples are of the data, which all read from one cache
    own.seed, own.data_seed = seed, data_seed(args)
    if not own.early_stopping:
        own.save_strategy = SaveStrategy.NO
    with TemporaryDirectory() as own.output_dir:
        trainer = CachedGateTrainer(model, own, data, processing_class=tokenizer, **cache)
        for shown in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(shown)
        trainer.add_callback(ProgressOfTraining(f"gate {model.config.gate}"))
        trainer.fill()
        start = time.perf_counter()
        trainer.train()
    return time.perf_counter() - start
