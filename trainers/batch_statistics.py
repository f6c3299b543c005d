"""Sums over the tokens of training batches, by domain: losses, gate weights and their entropy."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class Sums:
    """Sums over supervised tokens, by domain; `gate` and `top1` by domain and specialist; `scale` of logarithms."""

    tokens: np.ndarray
    nll: np.ndarray
    own_nll: np.ndarray
    entropy: np.ndarray
    scale: np.ndarray
    gate: np.ndarray
    top1: np.ndarray


class DomainSums:
    """Sums by domain over training batches. Each process keeps its own; `new` adds up those of all processes."""

    def __init__(self, domains: int, columns: int):
        self.sums = torch.zeros(domains, columns, dtype=torch.float64)
        self.read = {}  # sums when they were last read, by reader

    def add_rows(self, domain: Tensor, values: Tensor) -> None:
        """Adds values to the sums of their domains. Shapes (tokens,) and (tokens, columns)."""
        # one sum after another, in an order that does not change from run to run
        self.sums += torch.stack([values[domain == d].sum(0) for d in range(len(self.sums))]).cpu().double()

    def new(self, reader: str, accelerator) -> np.ndarray:
        """Returns the sums since this reader's last call, over all processes. Every process must call it."""
        new = self.sums - self.read.get(reader, torch.zeros_like(self.sums))
        self.read[reader] = self.sums.clone()
        if accelerator.num_processes > 1:
            new = accelerator.reduce(new.to(accelerator.device), "sum").cpu()
        return new.numpy()

    def state_dict(self, accelerator) -> dict:
        """Returns the sums of every process, so that a run on as many continues exactly."""
        readers = sorted(self.read)
        sums = torch.stack([self.sums, *(self.read[r] for r in readers)])[None]
        if accelerator.num_processes > 1:
            sums = accelerator.gather(sums.to(accelerator.device))
        return {"readers": readers, "sums": sums.tolist()}

    def load_state_dict(self, state: dict, process: int, processes: int) -> None:
        """Continues from `state_dict()`. If the number of processes has changed, the first takes all sums."""
        saved = torch.tensor(state["sums"], dtype=torch.float64)
        if len(saved) != processes:
            saved = torch.cat([saved.sum(0)[None], torch.zeros(processes - 1, *saved.shape[1:], dtype=torch.float64)])
        self.sums, *read = saved[process].unbind(0)
        self.read = dict(zip(state["readers"], read, strict=True))


class Statistics(DomainSums):
    """Sums of a fused model's losses and gate weights. Of signed ones entropy and the largest are those of their sizes."""

    def __init__(self, domains: int, specialists: int, signed: bool = False):
        super().__init__(domains, 5 + 2 * specialists)
        self.specialists, self.signed = specialists, signed
        self.last_mean = torch.full((specialists,), 1 / max(specialists, 1), dtype=torch.float64)

    @torch.no_grad()
    def add(
        self,
        domain: Tensor,
        mask: Tensor,
        log_probs: Tensor,
        gate_weights: Tensor,
        scales: Tensor | None,
        own: Tensor | None,
    ) -> None:
        """Adds one micro-batch. Shapes (batch, seq - 1); of `gate_weights` and `scales`, one for each specialist or scale."""
        weights, domain = gate_weights[mask].float(), domain[mask]
        shares = nn.functional.normalize(weights, p=1, dim=-1).abs() if self.signed else weights
        entropy = torch.special.entr(shares).sum(-1)
        # a single model has no columns
        top1 = nn.functional.one_hot(shares.argmax(-1), self.specialists).float() if self.specialists else shares
        own = torch.zeros_like(entropy) if own is None else -own[mask].float()
        scale = torch.zeros_like(entropy) if scales is None else scales[mask].float().log().mean(-1)
        columns = [torch.ones_like(entropy), -log_probs[mask].float(), own, entropy, scale]
        self.add_rows(domain, torch.cat([torch.stack(columns, -1), weights, top1], -1))

    def since(self, reader: str, accelerator) -> Sums:
        """Returns the sums since this reader's last call, over all processes. Every process must call it."""
        new, k = self.new(reader, accelerator), self.specialists
        return Sums(*new[:, :5].T, gate=new[:, 5 : 5 + k], top1=new[:, 5 + k :])

    def state_dict(self, accelerator) -> dict:
        """Returns the sums of every process, and the last mean gate weights."""
        return {**super().state_dict(accelerator), "mean": self.last_mean.tolist()}

    def load_state_dict(self, state: dict, process: int, processes: int) -> None:
        """Continues from `state_dict()`."""
        super().load_state_dict(state, process, processes)
        self.last_mean = torch.tensor(state["mean"], dtype=torch.float64)
