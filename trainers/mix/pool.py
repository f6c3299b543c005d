"""The pool: a few training examples of each domain, always the same, that rewards are measured on."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ..forward_hooks import capture, own_log_probs


class Pool:
    """Runs the model over `mix_probe` training examples of each domain. Every process gets the same numbers.

    Args:
        trainer: The stage. Its model, collator and training data are used.
    """

    def __init__(self, trainer):
        self.trainer, self.args = trainer, trainer.args
        self.places = self._choose()

    def _choose(self) -> list[int]:
        """Places of the pool's examples in the training set, domain after domain in turn."""
        rng, members = random.Random(self.args.seed), self.trainer.sampler.members
        chosen = [rng.sample(m, min(self.args.mix_probe, len(m))) for m in members[: len(self.trainer.domains)]]
        longest = max(map(len, chosen))
        return [c[i] for i in range(longest) for c in chosen if i < len(c)]

    def by_domain(self, values: np.ndarray) -> list[np.ndarray]:
        """One value per pool example, by domain, without the NaN of those that have no supervised token."""
        places = self.trainer.train_dataset["domain"]
        of = np.array([self.trainer.domains.index(places[i]) for i in self.places])
        # an example's tokens are the same at any time, so NaN are too
        return [values[(of == d) & ~np.isnan(values)] for d in range(len(self.trainer.domains))]

    @torch.no_grad()
    def losses(self, *, own: bool = False, entropy: bool = False) -> np.ndarray:
        """Mean over each pool example's supervised tokens of the loss, or of the entropy. Shape (examples,)."""
        found = torch.zeros(2, len(self.places), dtype=torch.float64)
        with self._probing():
            for places, batch in self._batches(self.places):
                labels = batch["labels"]
                seen = self._forward(batch, own=own)
                scores, mask = seen["scores"], seen["scores"].label_mask
                values = scores.entropy if entropy else -scores.log_probs
                if own:
                    values = -own_log_probs(
                        self.trainer.fused,
                        self.trainer.own_specialists,
                        seen["hidden_states"],
                        labels,
                        seen["domain"][:, 1:],
                        mask,
                    )
                for row, place in enumerate(places):
                    found[:, place] = torch.stack(
                        [(values * mask)[row].double().sum(), mask[row].double().sum()]
                    ).cpu()
        sums, tokens = self._reduced(found).numpy()
        with np.errstate(invalid="ignore"):
            return sums / tokens

    @torch.no_grad()
    def mean_hidden_states(self) -> np.ndarray:
        """Mean over each domain's examples of the mean last hidden state (Wu et al., 2024, Eq. 7). Shape (domains, hidden)."""
        sums = None
        with self._probing():
            for places, batch in self._batches(self.places):
                mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
                seen = self._forward(batch, hidden=True)
                states, domain = seen["last_hidden_state"].double(), seen["domain"]
                mask = mask.double() / mask.sum(1, keepdim=True).clamp(min=1)
                means = (states * mask[..., None]).sum(1)[: len(places)]
                if sums is None:
                    sums = torch.zeros(len(self.trainer.domains), states.shape[-1], dtype=torch.float64)
                sums.index_add_(0, domain[: len(places), 0].cpu(), means.cpu())
        return self._reduced(sums).numpy()

    def gradients(self, half: int) -> np.ndarray:
        """Gradient of each domain's loss on one half of the pool, by what is trained. Shape (domains, parameters)."""
        trainer = self.trainer
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        domains = trainer.train_dataset["domain"]
        found = []
        with self._probing():
            for domain in trainer.domains:
                total = [torch.zeros_like(p) for p in parameters]
                for own, batch in self._batches([i for i in self.places if domains[i] == domain][half::2]):
                    batch.pop("domain")
                    # not the wrapped model: its hooks wait for a backward pass over everything
                    scores = trainer.model(**batch, use_cache=False, fused_lm_head=True)
                    if own:
                        loss = -scores.log_probs.sum() / scores.label_mask.sum().clamp(min=1)
                        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                        for t, g in zip(total, gradients, strict=True):
                            if g is not None:
                                t += g
                found.append(self._reduced(torch.cat([t.flatten().float().cpu() for t in total])).numpy())
        return np.stack(found)

    @contextmanager
    def _probing(self) -> Iterator[None]:
        """Leaves training as it found it: mode, random numbers and gradients."""
        model = self.trainer.model
        training = model.training
        device = self.trainer.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            model.eval()
            try:
                yield
            finally:
                model.train(training)

    def _batches(self, places: list[int]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """This process's share of some examples, as many batches as every other's: passes may be collective."""
        accelerator, size = self.trainer.accelerator, self.args.per_device_train_batch_size
        at_once = accelerator.num_processes * size
        for start in range(0, len(places), at_once):
            group = places[start : start + at_once]
            own = list(range(start, start + len(group)))[accelerator.process_index :: accelerator.num_processes]
            rows = [self.trainer.train_dataset[places[i]] for i in own] or [self.trainer.train_dataset[places[0]]]
            columns = self.trainer._signature_columns
            if columns and self.args.remove_unused_columns:
                rows = [{k: v for k, v in row.items() if k in columns} for row in rows]
            batch = self.trainer._prepare_inputs(self.trainer.data_collator(rows))
            yield own, batch

    def _forward(self, batch: dict[str, Tensor], **kept) -> dict:
        domain = batch.pop("domain")
        with self.trainer.compute_loss_context_manager(), capture(self.trainer.fused, **kept) as seen:
            self.trainer.model_wrapped(**batch, use_cache=False, fused_lm_head=True)
        return {**seen, "domain": domain}

    def _reduced(self, values: Tensor) -> Tensor:
        accelerator = self.trainer.accelerator
        return accelerator.reduce(values.to(accelerator.device), "sum").cpu()
