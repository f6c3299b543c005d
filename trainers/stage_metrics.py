"""Metrics of every domain for a stage's log, and the warnings that follow from them."""

import warnings

import numpy as np

from .batch_statistics import Sums


# mean factor on the logits from which a stage tells that the gate has learned to be very sure
SHARP = 2.0


def domain_metrics(trainer) -> dict[str, float]:
    """Returns metrics of every domain: loss, tokens, epochs, share of the mix, the specialists' weights, and how sharp.

    Args:
        trainer: A stage. Its statistics since the last log are read.
    """
    sums = trainer.statistics.since("log", trainer.accelerator)
    step = trainer.state.global_step
    epochs = trainer.sampler.epochs(step)
    mix = trainer.sampler.mix(max(step - 1, 0))
    names = trainer.specialist_names
    calibrates = names and trainer.fused.config.gate_calibration
    metrics = {}
    for d, domain in enumerate(trainer.drawn):
        tokens = sums.tokens[d]
        metrics |= {f"tokens/{domain}": tokens, f"epochs/{domain}": epochs[d], f"mix/{domain}": mix[d]}
        if tokens:
            metrics[f"loss/{domain}"] = sums.nll[d] / tokens
            if names:
                metrics[f"gate_entropy/{domain}"] = sums.entropy[d] / tokens
            if calibrates:
                metrics[f"gate_scale/{domain}"] = np.exp(sums.scale[d] / tokens)
            metrics |= {f"gate/{domain}/{n}": w for n, w in zip(names, sums.gate[d] / tokens, strict=True)}
            metrics |= {f"top1/{domain}/{n}": w for n, w in zip(names, sums.top1[d] / tokens, strict=True)}
    if trainer.controller is not None:
        metrics |= trainer.controller.metrics()
    _warn(trainer, sums, mix)
    return {name: round(float(value), 6) for name, value in metrics.items()}


def _warn(trainer, sums: Sums, mix: np.ndarray) -> None:
    silent = [d for d, n in enumerate(sums.tokens) if not n and mix[d] * trainer.sampler.batch_size >= 1]
    if silent and sums.tokens.sum():
        raise ValueError(
            f"Every domain's batches must hold supervised tokens, but since the last log "
            f"{[trainer.drawn[d] for d in silent]} held none: all its labels are -100. Look at its rows, at the chat "
            f"template's generation marks, and at `max_length`."
        )
    if trainer.specialist_names and trainer.fused.config.signed_weights is None:
        # signed weights are no shares: one may have all of it, and they need not move far
        _warn_of_gate(trainer, sums)


def _warn_of_gate(trainer, sums: Sums) -> None:
    tokens = max(sums.tokens.sum(), 1)
    shares, names = sums.gate.sum(0) / tokens, trainer.specialist_names
    if len(names) > 1 and shares.max() > 0.98:
        _tell(
            trainer,
            f"The gate has collapsed: {names[int(shares.argmax())]!r} has {shares.max():.1%} of the weight over all "
            f"domains. Check that every domain is drawn; `gate_balance` counteracts it.",
        )
    learns = any(p.requires_grad for p in trainer.fused.model.fusion_gate.parameters())
    if not learns or trainer.state.global_step <= max(20, 0.2 * (trainer.state.max_steps or 0)):
        return
    entropy, largest = sums.entropy.sum() / tokens, np.log(len(names))
    if entropy > 0.999 * largest:
        _tell(
            trainer,
            f"The gate has hardly moved after {trainer.state.global_step} steps: its entropy is {entropy:.4f} nats of "
            f"at most {largest:.4f}. Raise `learning_rate` (now {trainer.args.learning_rate:g}).",
        )
    of_domains = zip(trainer.drawn, sums.scale, sums.tokens, strict=True)
    scales = {domain: round(float(np.exp(scale / n)), 1) for domain, scale, n in of_domains if n}
    if scales and max(scales.values()) > SHARP:
        sharpest = max(scales, key=scales.get)
        _tell(
            trainer,
            f"The gate multiplies logits by {scales[sharpest]} in {sharpest!r}: answers that a model wrote greedily, or a "
            f"template, teach it to be so sure, and on other text it is wrong. Draw answers by sampling, raise `gate_scale` (now "
            f"{trainer.args.gate_scale:g}), or fuse with a gate without `+calibration`.",
        )


def _tell(trainer, sentence: str) -> None:
    """Warns once of each thing: a sentence's beginning says which."""
    about = sentence[:20]
    if about not in trainer.warned:
        trainer.warned.add(about)
        warnings.warn(sentence, stacklevel=6)
