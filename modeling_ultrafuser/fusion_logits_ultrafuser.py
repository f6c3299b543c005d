"""The "logits" rule, the paper's: one wide linear head on the gate-scaled hidden states."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .families_ultrafuser import bounded, soft_cap
from .fusion_base_ultrafuser import Fusion
from .outputs_ultrafuser import UltraFuserModelOutput
from .readers_ultrafuser import reader_of
from .refusals_ultrafuser import Refusal


class LogitsFusion(Fusion):
    """Mixes logits as one wide linear head: the paper's rule (Ding et al., 2024, Eq. 1).

    logits = sum_k w_k h_k W_k^T.
    """

    one_head = True
    scale_for_each = False
    # a second specialist's small weight costs more than a late change here, so that changes are held to be rare
    switch_probability = 1e-6
    output_class = UltraFuserModelOutput

    @classmethod
    def check(cls, config) -> None:
        """Rejects specialists with different soft caps."""
        soft_caps = [soft_cap(c) for c in config.specialists]
        if len(set(soft_caps)) > 1:
            raise Refusal(
                f"`final_logit_softcapping` is {dict(zip(config.specialist_names, soft_caps, strict=True))}",
                "A logit soft cap is not linear, so mixing logits needs one cap for all specialists",
                "Choose fusion='probabilities', or fuse specialists of one family.",
                about="architecture",
            )

    @classmethod
    def fused_cap(cls, config) -> float | None:
        """Returns the specialists' cap, which bounds the mixture."""
        return soft_cap(config.specialists[0])

    def factors(self, gate_weights: Tensor, logit_scales: Tensor | None) -> Tensor:
        return gate_weights if logit_scales is None else gate_weights * logit_scales

    def forward(self, hidden_states: list[Tensor], gate_weights: Tensor, logit_scales: Tensor | None = None) -> Tensor:
        """As `Fusion.forward`. Adapters of one base have its head in common: their scaled states are summed instead."""
        if not reader_of(self.config).shares_head:
            return super().forward(hidden_states, gate_weights, logit_scales)
        return sum(self.scaled(hidden_states, gate_weights, logit_scales))

    def logits(self, head: nn.Module, hidden_states: Tensor, gate_weights: Tensor) -> Tensor:
        return bounded(head(hidden_states), soft_cap(self.config))

    def logits_of(self, head: Tensor, hidden_states: Tensor, gate_weights: Tensor) -> Tensor:
        return bounded(F.linear(hidden_states, head), soft_cap(self.config)).float()

    def fused(
        self,
        logits: Iterable[Tensor],
        gate_weights: Tensor,
        logit_scales: Tensor | None = None,
        kept: Sequence[int] | None = None,
    ) -> Tensor:
        factors = self.factors(gate_weights, logit_scales)
        fused = None
        for k, own in zip(range(factors.shape[-1]) if kept is None else kept, logits, strict=True):
            part = own.float() * factors[..., k, None]
            fused = part if fused is None else fused + part
        return bounded(fused, soft_cap(self.config))
