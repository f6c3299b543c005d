"""Stage two with the activations and the gradients of one specialist in memory at a time.

A specialist k meets the others only in its last hidden states h_k. So each micro-batch runs the specialists without
keeping activations, and goes back from the loss no further than to the gate, the heads and G_k = dL/dh_k. When the
optimizer is due, gate and heads are updated; then each specialist in turn runs once more over every micro-batch, goes
back from its G_k, is updated, and drops its gradients before the next one has any. Nothing is approximated: the sums are
those of the ordinary backward pass, in its order.

To cut a backward pass at representations is GradCache's idea (Gao et al., 2021, arXiv 2101.06983), to run twice instead
of keeping activations is gradient checkpointing (Chen et al., 2016, arXiv 1604.06174).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput


class SerialBackward:
    """The backward pass and the optimizer step of a fused model, one specialist after another.

    Args:
        model: What is trained: the fused model, or a PEFT model around it.
        fused: The fused model itself.
        max_grad_norm: Largest gradient norm of each specialist, and of gate and heads together; 0 for no limit.

    Raises:
        ValueError: If specialists share parameters that are trained.
    """

    def __init__(self, model: nn.Module, fused: PreTrainedModel, max_grad_norm: float):
        self.max_grad_norm = max_grad_norm
        self.specialists = dict(fused.model.specialists.items())
        trained = {name: _trained(specialist) for name, specialist in self.specialists.items()}
        self.parts = {name: parameters for name, parameters in trained.items() if parameters}
        owners = {id(p): name for name, parameters in trained.items() for p in parameters}
        if len(owners) < sum(map(len, trained.values())):
            raise ValueError(
                "`one_specialist_at_a_time` updates a specialist before the next one's backward pass, so no parameter "
                "that is trained may belong to two, but here some do. Leave it out."
            )
        self.others = [p for p in _trained(model) if id(p) not in owners]
        # of each micro-batch, what a specialist returned, and the same cut off from it, where G_k arrives
        self.passes: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.parts}
        self.grad_norm = 0.0

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Within it, specialists keep no activations, and a backward pass ends at their last hidden states."""
        before = {name: self.specialists[name].__dict__.get("forward") for name in self.parts}
        for name in self.parts:
            specialist = self.specialists[name]
            specialist.forward = partial(self._forward, name, specialist.forward)
        try:
            yield
        finally:
            for name, forward in before.items():
                del self.specialists[name].forward
                if forward is not None:
                    self.specialists[name].forward = forward

    def _forward(self, name: str, forward, **inputs) -> ModelOutput:
        if not torch.is_grad_enabled():
            return forward(**inputs)
        # reentrant: the first run is truly without autograd, and this one node of a graph is all that stays of it.
        # torch wants an input that needs a gradient, and looks at its device for the random numbers to repeat
        anchor = torch.zeros((), device=self.specialists[name].device, requires_grad=True)
        states = checkpoint(lambda _: forward(**inputs).last_hidden_state, anchor, use_reentrant=True)
        leaf = states.detach().requires_grad_()
        self.passes[name].append((states, leaf))
        return BaseModelOutput(last_hidden_state=leaf)

    def finish(self, optimizer: torch.optim.Optimizer) -> None:
        """Goes back through every specialist, and updates all parameters: after it, none has a gradient."""
        norms = [self._update(self.others, optimizer)]
        for name, parameters in self.parts.items():
            passes = self.passes[name]
            while passes:
                states, leaf = passes.pop(0)
                torch.autograd.backward(states, leaf.grad)
            norms.append(self._update(parameters, optimizer))
        self.grad_norm = torch.stack([n.to(norms[0]) for n in norms]).norm().item()

    def _update(self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> Tensor:
        """Steps these parameters alone: an optimizer passes over what has no gradient. Returns their gradients' norm."""
        if self.max_grad_norm:
            norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        return norm


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]
