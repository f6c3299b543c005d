"""Measures a model while it is trained, for rewards: on training batches, and on a pool of training examples."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..compat import on_device, token_scores, without_unused_columns
from ..forward_hooks import evaluating, own_log_probs


class Probe:
    """All that a reward may read of a stage. Every process gets the same numbers.

    The pool is `mix_probe` training examples of each domain, always the same. Measuring it leaves training as it was:
    mode, random numbers and gradients.

    Args:
        trainer: The stage. Its model, data, collator and statistics are read.

    Attributes:
        domains: Names of the domains, in the order of the mix.
        stage: "gate", "joint" or "single".
        sharded: Whether FSDP or DeepSpeed hold parameters or gradients in parts.
    """

    def __init__(self, trainer):
        self.domains, self.stage = trainer.domains, trainer.stage
        self.sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        self._trainer, self._accelerator = trainer, trainer.accelerator

    # ---- training batches

    def batch_losses(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns mean losses of each domain's batches since the last call: the model's, and its own specialist's.

        Shapes (domains,), in nats per token. The specialist's is 0 unless the reward `watches_specialists`.
        """
        sums = self._trainer.statistics.since("mix", self._accelerator)
        # mixed examples, counted last, are of no domain
        nll, own_nll, tokens = (n[: len(self.domains)] for n in (sums.nll, sums.own_nll, sums.tokens))
        return nll / tokens, own_nll / tokens

    # ---- the pool

    @cached_property
    def places(self) -> list[int]:
        """Indices of the pool's examples in the training set, one of each domain in turn."""
        args, members = self._trainer.args, self._trainer.sampler.members[: len(self.domains)]
        rng = random.Random(args.seed)
        chosen = [rng.sample(m, min(args.mix_probe, len(m))) for m in members]
        longest = max(map(len, chosen))
        return [c[i] for i in range(longest) for c in chosen if i < len(c)]

    def by_domain(self, values: np.ndarray) -> list[np.ndarray]:
        """Splits one value per pool example by domain, without the NaN of examples that have no supervised token."""
        # an example's tokens are the same at any time, so NaN are too
        return [values[(self._domain_of == d) & ~np.isnan(values)] for d in range(len(self.domains))]

    @torch.no_grad()
    def losses(self, *, own: bool = False, entropy: bool = False) -> np.ndarray:
        """Returns the mean over each pool example's supervised tokens of a value in nats. Shape (examples,).

        Args:
            own: Take the loss of the domain's own specialist, instead of the model's.
            entropy: Take the entropy of the predictions, instead of the loss.
        """
        found = torch.zeros(2, len(self.places), dtype=torch.float64)
        with self._probing():
            for places, batch in self._batches(self.places):
                labels = batch["labels"]
                seen = self._forward(batch, own=own)
                scores, mask = seen["scores"], seen["scores"].label_mask
                values = scores.entropy if entropy else -scores.log_probs
                if own:
                    values = -own_log_probs(self._trainer, seen, labels, seen["domain"][:, 1:])
                for row, place in enumerate(places):
                    sums = [(values * mask)[row].double().sum(), mask[row].double().sum()]
                    found[:, place] = torch.stack(sums).cpu()
        sums, tokens = self._summed(found).numpy()
        with np.errstate(invalid="ignore"):
            return sums / tokens

    @torch.no_grad()
    def mean_hidden_states(self) -> np.ndarray:
        """Returns the mean over each domain's pool of an example's mean last hidden state. Shape (domains, hidden).

        Wu et al., 2024, Eq. 7.
        """
        sums = None
        with self._probing():
            for places, batch in self._batches(self.places):
                mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
                seen = self._forward(batch, hidden=True)
                states, domain = seen["last_hidden_state"].double(), seen["domain"]
                mask = mask.double() / mask.sum(1, keepdim=True).clamp(min=1)
                means = (states * mask[..., None]).sum(1)[: len(places)]
                if sums is None:
                    sums = torch.zeros(len(self.domains), states.shape[-1], dtype=torch.float64)
                sums.index_add_(0, domain[: len(places), 0].cpu(), means.cpu())
        return self._summed(sums).numpy()

    def gradients(self, half: int) -> np.ndarray:
        """Returns the gradient of each domain's loss on one half of its pool. Shape (domains, trained parameters)."""
        with self._probing():
            return np.stack([self._gradient(d, half) for d in range(len(self.domains))])

    # ---- all processes

    def gathered(self, values: np.ndarray) -> np.ndarray:
        """Returns the float64 values of every process. Shape (processes, values)."""
        if self._accelerator.num_processes == 1:
            return values[None]
        one = torch.tensor(values, dtype=torch.float64, device=self._accelerator.device)[None]
        return self._accelerator.gather(one).cpu().numpy()

    # ---- passes

    @cached_property
    def _domain_of(self) -> np.ndarray:
        names = self._trainer.train_dataset["domain"]
        return np.array([self.domains.index(names[i]) for i in self.places])

    def _gradient(self, domain: int, half: int) -> np.ndarray:
        model = self._trainer.model
        parameters = [p for p in model.parameters() if p.requires_grad]
        total = [torch.zeros_like(p) for p in parameters]
        examples = [place for place, d in zip(self.places, self._domain_of, strict=True) if d == domain]
        for places, batch in self._batches(examples[half::2]):
            batch.pop("domain")
            # not the wrapped model: its hooks wait for a backward pass over everything
            scores = token_scores(model, batch)
            if places:
                loss = -scores.log_probs.sum() / scores.label_mask.sum().clamp(min=1)
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for t, g in zip(total, gradients, strict=True):
                    if g is not None:
                        t += g
        return self._summed(torch.cat([t.flatten().float().cpu() for t in total])).numpy()

    @contextmanager
    def _probing(self) -> Iterator[None]:
        """Leaves training as it found it: mode, random numbers and gradients."""
        device = self._accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), evaluating(self._trainer.model):
            yield

    def _batches(self, examples: list[int]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Yields this process's share of some examples, as many batches as every other's: passes may be collective.

        A batch without a share of its own has an example of another process, and no places.
        """
        trainer, rank, processes = self._trainer, self._accelerator.process_index, self._accelerator.num_processes
        at_once = processes * trainer.args.per_device_train_batch_size
        dataset = without_unused_columns(trainer, trainer.train_dataset)
        for start in range(0, len(examples), at_once):
            places = list(range(start, min(start + at_once, len(examples))))[rank::processes]
            rows = [dataset[examples[i]] for i in places or [0]]
            yield places, on_device(trainer, trainer.data_collator(rows))

    def _forward(self, batch: dict[str, Tensor], **kept) -> dict:
        domain = batch.pop("domain")
        with self._trainer.compute_loss_context_manager(), self._trainer.watch(**kept) as seen:
            token_scores(self._trainer.model_wrapped, batch)
        return {**seen, "domain": domain}

    def _summed(self, values: Tensor) -> Tensor:
        return self._accelerator.reduce(values.to(self._accelerator.device), "sum").cpu()
