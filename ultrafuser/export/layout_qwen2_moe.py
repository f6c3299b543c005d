"""The layout of Qwen2-MoE."""

from transformers import PreTrainedConfig, Qwen2MoeConfig

from .layout_base import TOP, Layout


SHARED = 256  # at most the width of the shared expert, which is all 0


class Qwen2MoeLayout(Layout):
    """Qwen2 specialists as Qwen2-MoE. Its shared expert, which runs at every token, is all 0."""

    families = ("qwen2",)
    config_class = Qwen2MoeConfig
    expert = "model.layers.{layer}.mlp.experts.{expert}.{part}.weight"
    parts = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
    router = "model.layers.{layer}.mlp.gate.weight"

    def settings(self, config: PreTrainedConfig, experts: int) -> dict:
        return {
            "num_experts": experts,
            "num_experts_per_tok": min(TOP, experts),
            "moe_intermediate_size": config.intermediate_size,
            "shared_expert_intermediate_size": self._shared(config),
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }

    def _shared(self, config: PreTrainedConfig) -> int:
        return min(SHARED, config.intermediate_size)

    def zeros(self, config: PreTrainedConfig, layer: int) -> dict[str, tuple[int, ...]]:
        block, wide, narrow = f"model.layers.{layer}.mlp.shared_expert", self._shared(config), config.hidden_size
        return {
            f"{block}.gate_proj.weight": (wide, narrow),
            f"{block}.up_proj.weight": (wide, narrow),
            f"{block}.down_proj.weight": (narrow, wide),
            f"{block}_gate.weight": (1, narrow),
        }
