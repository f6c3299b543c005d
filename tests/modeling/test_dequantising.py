"""The way out that is named to owners of quantised folders is run as it stands, and its result fused."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.tiny import specialist


IDS = torch.arange(3, 19)[None]
MXFP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
ATTENTION = ["full_attention", "sliding_attention"]


def mxfp4(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts in 4 bits, 32 to a scale, as GPT-OSS is published."""
    packed = dict(weights)
    for name in [n for n in weights if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        columns = packed.pop(name).float().transpose(1, 2).unflatten(2, (-1, 32))
        exponents = (columns.abs().amax(-1) / 6).clamp(min=1e-12).log2().ceil()
        nearest = (columns / exponents.exp2()[..., None]).unsqueeze(-1).sub(MXFP4).abs().argmin(-1)
        packed[f"{name}_blocks"] = (nearest[..., ::2] + 16 * nearest[..., 1::2]).to(torch.uint8)
        packed[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    return packed


def fp8(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Linear layers in 8 bits, with a scale for each block of 16 x 16."""
    packed = dict(weights)
    for name in [n for n in weights if n.endswith("_proj.weight")]:
        blocks = weights[name].float().unflatten(1, (-1, 16)).unflatten(0, (-1, 16))
        scales = blocks.abs().amax((1, 3)) / 448
        scaled = blocks / scales[:, None, :, None]
        packed[name] = scaled.flatten(2, 3).flatten(0, 1).to(torch.float8_e4m3fn)
        packed[f"{name}_scale_inv"] = scales
    return packed


METHODS = {
    "mxfp4": (
        mxfp4,
        lambda: specialist(
            "gpt_oss", hidden_size=64, num_local_experts=4, num_experts_per_tok=2, layer_types=ATTENTION
        ),
        {"modules_to_not_convert": ["model.layers.*.self_attn", "model.embed_tokens", "lm_head"]},
    ),
    "fp8": (
        fp8,
        lambda: specialist("llama", hidden_size=64),
        {"weight_block_size": [16, 16], "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]},
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_way_out_of_a_quantised_folder_leads_to_a_fused_model(method, tmp_path):
    pack, build, settings = METHODS[method]
    folder, plain = tmp_path / "quantised", tmp_path / "plain"
    build().bfloat16().save_pretrained(folder)
    published = load_file(folder / "model.safetensors")
    save_file(pack(published), folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    other = specialist("llama", hidden_size=64).bfloat16()
    with pytest.raises(ValueError, match="'text' is .* with quantised weights\\. .*Make them plain once") as refusal:
        UltraFuserForCausalLM.from_specialists({"text": folder, "code": other})
    (code,) = re.findall(r"`(AutoModel.*?)`", str(refusal.value))
    names = ("AutoModelForCausalLM", "Mxfp4Config", "FineGrainedFP8Config")
    eval(code, {name: getattr(transformers, name) for name in names} | {"ID": folder, "FOLDER": plain})

    dequantised = transformers.AutoModelForCausalLM.from_pretrained(plain)
    fused = UltraFuserForCausalLM.from_specialists({"text": plain, "code": other})
    with torch.no_grad():
        assert torch.equal(fused.specialist("text")(IDS).logits, dequantised(IDS).logits)
    # it is the model that was published and no other one, to so many bits
    for name, tensor in load_file(plain / "model.safetensors").items():
        expected = published[name].float()
        assert (tensor.float() - expected).norm() <= 0.2 * expected.norm(), name
