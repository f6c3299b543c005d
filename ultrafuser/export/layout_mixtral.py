"""The layout of Mixtral."""

from transformers import MixtralConfig, PreTrainedConfig

from .layout_base import TOP, Layout


class MixtralLayout(Layout):
    """Llama and Mistral specialists as Mixtral (Jiang et al., 2024, https://arxiv.org/abs/2401.04088)."""

    families = ("llama", "mistral")
    config_class = MixtralConfig
    expert = "model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"
    parts = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    router = "model.layers.{layer}.block_sparse_moe.gate.weight"

    def settings(self, config: PreTrainedConfig, experts: int) -> dict:
        return {"num_local_experts": experts, "num_experts_per_tok": min(TOP, experts)}
