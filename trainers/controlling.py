"""What a learned mix is fed with: rewards, read from training batches or measured on a pool of training examples."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from .mixing import effective_epochs, guarded
from .policies import POLICIES, Smoothing
from .rewards import difficulty, gradient_cosine, regret, similarity, towards_target, usable_rewards
from .watching import own_log_probs, watching


# Whether each is read from ordinary training batches, at no pass of its own.
REWARDS: dict[str, bool] = {
    "loss": True,
    "regret": True,
    "difficulty": False,
    "similarity": False,
    "gradient": False,
    "uncertainty": False,
}


class MixController:
    """Measures rewards every `mix_every` steps, lets a policy answer, and puts the mix in force.

    Every process computes the same numbers: statistics are summed over all of them before anything reads them, and the
    resulting mixes are compared.

    "loss" is the mean loss of a domain's training batches, "regret" its perplexity over that of the domain's own
    specialist. Stage one reads the specialist from the same batches; in stage two the specialists move, so there
    regret is measured on the pool, against what the specialists said before. The other rewards (see `rewards`) are
    measured on the pool: `mix_probe` training examples of each domain, always the same.

    Args:
        trainer: The stage. Its sampler, statistics and model are used.
    """

    def __init__(self, trainer):
        self.trainer, self.args = trainer, trainer.args
        self.reward = self.args.mix_reward
        self.from_batches = REWARDS[self.reward] and not (self.reward == "regret" and trainer.stage == "joint")
        self.reads_own_specialists = self.reward == "regret" and self.from_batches
        if self.args.mix_target is not None and self.args.mix_target not in trainer.domains:
            raise ValueError(f"`mix_target` must be one of {trainer.domains}, but is {self.args.mix_target!r}.")
        if self.reward == "gradient" and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            raise ValueError(
                "mix_reward='gradient' compares whole gradients, which no process holds under FSDP or DeepSpeed. Choose "
                "another reward, or train with DDP."
            )
        if not self.from_batches and (self.args.packing or self.args.padding_free):
            raise ValueError(
                f"mix_reward={self.reward!r} scores examples one by one, but with packing or without padding they share "
                f"rows. Set packing=False and padding_free=False, or learn from 'loss', or from 'regret' in stage one."
            )
        if self.reward == "gradient" and self.args.mix_probe < 2:
            raise ValueError("mix_reward='gradient' compares two halves of the pool. Take mix_probe=2 or more.")
        guarded(trainer.prior, floor=self.args.mix_floor)  # refuses a floor that is too high now, not in an hour
        settings = self.args.mix_policy_settings or {}
        self.policy = POLICIES[self.args.mix_policy](trainer.prior, **settings)
        self.smoothing = Smoothing(len(trainer.domains), self.args.mix_smoothing)
        self.mixes = [(0, trainer.prior.tolist())]  # in `mix_unit`; the sampler holds them in examples
        self.rewards = np.full(len(trainer.domains), np.nan)
        self.baseline: np.ndarray | None = None
        self.pool = None if self.from_batches else self._choose_pool()

    def begin(self) -> None:
        """Scores the pool once, before the first step, where the reward compares with the start."""
        if self.reward in ("difficulty", "regret") and not self.from_batches and self.baseline is None:
            self.baseline = self._losses(own=self.reward == "regret")

    def mix_at(self, step: int) -> np.ndarray:
        """The mix in force for the batch of that optimizer step, in `mix_unit`. Shape (domains,)."""
        if self.args.mix_shadow:
            return np.array(self.mixes[0][1])
        return np.array(next(mix for start, mix in reversed(self.mixes) if start <= step))

    def update(self) -> None:
        """Measures, learns, and sets the mix that takes effect `mix_delay` steps from now."""
        trainer, step = self.trainer, self.trainer.state.global_step
        mix = self.mix_at(max(step - 1, 0))
        with np.errstate(all="ignore"):
            self.rewards = self._measure()
        rewards = usable_rewards(self.rewards, mix, trainer.domains)
        if rewards is None:
            return
        new = guarded(
            self.policy.update(self.smoothing.update(rewards), mix),
            floor=self.args.mix_floor,
            epochs=effective_epochs(trainer.sampler.counts(step), trainer.sizes)[: len(trainer.domains)],
            max_epochs=np.inf if self.args.mix_max_epochs is None else self.args.mix_max_epochs,
        )
        self._check_same_everywhere(new)
        start = step + self.args.mix_delay
        self.mixes.append((start, new.tolist()))
        if not self.args.mix_shadow:
            trainer.sampler.set_mix(trainer.in_examples(new), start)

    def metrics(self) -> dict[str, float]:
        """For the log: rewards as measured, and the mix that was learned last."""
        named = zip(self.trainer.domains, self.rewards, self.mixes[-1][1], strict=True)
        found = {k: v for d, r, m in named for k, v in ((f"reward/{d}", r), (f"learned_mix/{d}", m))}
        return {name: value for name, value in found.items() if np.isfinite(value)}  # none before the first update

    def state_dict(self) -> dict:
        """Everything that the next update depends on."""
        return {
            "policy": self.policy.state_dict(),
            "smoothing": self.smoothing.state_dict(),
            "mixes": self.mixes,
            "rewards": self.rewards.tolist(),
            "baseline": None if self.baseline is None else self.baseline.tolist(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues from `state_dict()`. What the pool scored at the start cannot be measured again."""
        self.policy.load_state_dict(state["policy"])
        self.smoothing.load_state_dict(state["smoothing"])
        self.mixes = [(start, mix) for start, mix in state["mixes"]]
        self.rewards = np.array(state["rewards"], float)
        self.baseline = None if state["baseline"] is None else np.array(state["baseline"])

    def _check_same_everywhere(self, mix: np.ndarray) -> None:
        accelerator = self.trainer.accelerator
        if accelerator.num_processes > 1:
            own = torch.tensor(mix, dtype=torch.float64, device=accelerator.device)[None]
            every = accelerator.gather(own)
            if not (every == every[0]).all():
                raise RuntimeError(
                    f"Every process must draw from the same mix, but they have {every.tolist()}. Are versions and seeds "
                    f"the same on all machines?"
                )

    # ---- rewards

    def _measure(self) -> np.ndarray:
        """Rewards of all domains. Shape (domains,)."""
        target = None if self.args.mix_target is None else self.trainer.domains.index(self.args.mix_target)
        if self.from_batches:
            found = self.trainer.statistics.since("mix", self.trainer.accelerator)
            # mixed examples, counted last, are of no domain
            nll, own_nll, tokens = (n[: len(self.trainer.domains)] for n in (found.nll, found.own_nll, found.tokens))
            losses, own = nll / tokens, own_nll / tokens
            # of all the tokens together: a batch's examples are not told apart
            rewards = (
                losses
                if self.reward == "loss"
                else np.array([regret(*pair) for pair in zip(losses, own, strict=True)])
            )
        elif self.reward == "similarity":
            return similarity(self._mean_hidden_states(), target)
        elif self.reward == "gradient":
            rewards = gradient_cosine(*(self._gradients(half) for half in (0, 1)))
        elif self.reward == "uncertainty":
            # mean entropy, in one pass: MultiUAT (Wu et al., 2021, arXiv 2109.02284) takes 30 with dropout, which
            # language models mostly lack
            rewards = np.array([entropy.mean() for entropy in self._by_domain(self._losses(entropy=True))])
        else:
            formula = regret if self.reward == "regret" else difficulty
            pairs = zip(self._by_domain(self._losses()), self._by_domain(self.baseline), strict=True)
            rewards = np.array([formula(now, before) for now, before in pairs])
        return rewards if target is None else towards_target(rewards, target)

    # ---- the pool

    def _choose_pool(self) -> list[int]:
        """Places of the pool's examples in the training set, domain after domain in turn."""
        rng, members = random.Random(self.args.seed), self.trainer.sampler.members
        chosen = [rng.sample(m, min(self.args.mix_probe, len(m))) for m in members[: len(self.trainer.domains)]]
        longest = max(map(len, chosen))
        return [c[i] for i in range(longest) for c in chosen if i < len(c)]

    def _by_domain(self, values: np.ndarray) -> list[np.ndarray]:
        """One value per pool example, by domain, without the NaN of those that have no supervised token."""
        places = self.trainer.train_dataset["domain"]
        of = np.array([self.trainer.domains.index(places[i]) for i in self.pool])
        # an example's tokens are the same at any time, so NaN are too
        return [values[(of == d) & ~np.isnan(values)] for d in range(len(self.trainer.domains))]

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
        with self.trainer.compute_loss_context_manager(), watching(self.trainer.fused, **kept) as seen:
            self.trainer.model_wrapped(**batch, use_cache=False, fused_lm_head=True)
        return {**seen, "domain": domain}

    @torch.no_grad()
    def _losses(self, *, own: bool = False, entropy: bool = False) -> np.ndarray:
        """Mean over each pool example's supervised tokens of the loss, or of the entropy. Shape (examples,)."""
        found = torch.zeros(2, len(self.pool), dtype=torch.float64)
        with self._probing():
            for places, batch in self._batches(self.pool):
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
    def _mean_hidden_states(self) -> np.ndarray:
        """Mean over each domain's examples of the mean last hidden state (Wu et al., 2024, Eq. 7). Shape (domains, hidden)."""
        sums = None
        with self._probing():
            for places, batch in self._batches(self.pool):
                mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
                seen = self._forward(batch, hidden=True)
                states, domain = seen["last_hidden_state"].double(), seen["domain"]
                mask = mask.double() / mask.sum(1, keepdim=True).clamp(min=1)
                means = (states * mask[..., None]).sum(1)[: len(places)]
                if sums is None:
                    sums = torch.zeros(len(self.trainer.domains), states.shape[-1], dtype=torch.float64)
                sums.index_add_(0, domain[: len(places), 0].cpu(), means.cpu())
        return self._reduced(sums).numpy()

    def _gradients(self, half: int) -> np.ndarray:
        """Gradient of each domain's loss on one half of the pool, by what is trained. Shape (domains, parameters)."""
        trainer = self.trainer
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        domains = trainer.train_dataset["domain"]
        found = []
        with self._probing():
            for domain in trainer.domains:
                total = [torch.zeros_like(p) for p in parameters]
                for own, batch in self._batches([i for i in self.pool if domains[i] == domain][half::2]):
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

    def _reduced(self, values: Tensor) -> Tensor:
        accelerator = self.trainer.accelerator
        return accelerator.reduce(values.to(accelerator.device), "sum").cpu()
