"""Every linear layer that PEFT adapts runs, on inputs of any rank."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    set_seed,
)

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.adapters_ultrafuser import AdaptedLinear, Rows
from tests.support.mixes import prompt
from tests.support.tiny import stir_gate


# ---------------------------------------------------------------------------------- every linear layer that PEFT adapts


SMALL = {
    **{"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}


FAMILIES = {
    # weights kept transposed
    "gpt2": (
        ["c_attn", "c_fc", "c_proj"],
        {"n_embd": 32, "n_layer": 2, "n_head": 4, **dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], 0.0)},
    ),
    # all tokens of a batch end to end
    "opt": (["q_proj", "fc1", "fc2"], {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
    # a linear layer of its own class
    "falcon": (["query_key_value", "dense", "dense_h_to_4h"], {}),
    # experts that all tokens share, end to end
    "qwen2_moe": (
        ["q_proj", "up_proj", "shared_expert_gate"],
        {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32},
    ),
}


@pytest.mark.grid
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_run_on_every_linear_layer_that_peft_adapts(family, tmp_path):
    targets, fields = FAMILIES[family]
    folders, merged = {}, {}
    set_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **fields)).save_pretrained(
        tmp_path / "base"
    )
    for rank, name in enumerate(("text", "code"), start=3):
        config = LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
        model.save_pretrained(tmp_path / name)
        folders[name], merged[name] = tmp_path / name, model.merge_and_unload().eval()
    fused, expected = (UltraFuserForCausalLM.from_specialists(given) for given in (folders, merged))
    stir_gate(fused)
    expected.model.fusion_gate.load_state_dict(fused.model.fusion_gate.state_dict())
    ids = prompt()
    with torch.no_grad():
        torch.testing.assert_close(fused(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fused.specialist("code")(ids).logits, merged["code"](ids).logits)
    texts = [m.generate(ids, max_new_tokens=8, do_sample=False) for m in (fused, expected)]
    assert torch.equal(*texts)
    # two batches of other sizes before their gradients, which run the layers once more
    fused.gradient_checkpointing_enable()
    fused.train()
    losses = [fused(part, labels=part).loss for part in (ids, ids[:1])]
    again = fused(ids, labels=ids).loss
    losses[0].backward()
    first = {name: p.grad.clone() for name, p in fused.named_parameters() if p.grad is not None}
    fused.zero_grad()
    again.backward()
    for name, p in fused.named_parameters():
        if name in first:
            torch.testing.assert_close(p.grad, first[name])


@pytest.mark.parametrize("shape", [(6, 5, 8), (6, 5, 2, 8), (6, 3, 5, 4, 8), (30, 8)])
@pytest.mark.parametrize("subclass", [False, True])
def test_a_layer_adapts_inputs_of_any_rank(shape, subclass):
    class Own(nn.Linear):
        def forward(self, hidden_states):
            return hidden_states @ self.weight.T + self.bias

    set_seed(0)
    rows = Rows()
    rows.count = 6
    layer = AdaptedLinear((Own if subclass else nn.Linear)(8, 7), 3, 2, rows)
    nn.init.normal_(layer.lora_A), nn.init.normal_(layer.lora_B)
    hidden = torch.randn(shape)
    found = layer(hidden)
    merged = [layer.merged(k) for k in range(3)]
    assert all(type(m) is type(layer.base_layer) for m in merged)
    for row, (own, result) in enumerate(zip(hidden.view(6, -1, 8), found.view(6, -1, 7), strict=True)):
        torch.testing.assert_close(result, merged[row % 3](own))
    assert found.shape == (*shape[:-1], 7)


def test_tokens_that_do_not_tell_their_rows_are_refused():
    rows = Rows()
    rows.count = 6
    layer = AdaptedLinear(nn.Linear(8, 7), 3, 2, rows)
    for shape in ((29, 8), (4, 5, 8)):
        with pytest.raises(ValueError, match="does not tell the rows of 3 specialists apart"):
            layer(torch.randn(shape))
