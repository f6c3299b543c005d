"""A fused model says exactly what its specialists say, weighed by its gate."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.gates_ultrafuser import GATES
from tests.support.mixes import MIXES, fuse, naive_gate_weights, naive_logits, prefer, prompt
from tests.support.tiny import specialist


FUSIONS = ("logits", "probabilities")


@pytest.fixture
def specialists():
    return MIXES["one family"]()


@pytest.fixture
def fused(specialists):
    return fuse(specialists)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


# ---------------------------------------------------------------------------------------------- the naive sum


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("mix", MIXES)
@torch.no_grad()
def test_a_fused_model_says_the_weighed_sum_of_what_its_specialists_say(mix, fusion):
    specialists = MIXES[mix]()
    fused, ids = fuse(specialists, fusion=fusion), prompt()
    outputs = fused(ids)
    assert_same(outputs.gate_weights, naive_gate_weights(fused, specialists, ids))
    assert_same(outputs.logits, naive_logits(fused, specialists, ids, outputs.gate_weights))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_the_sum_holds_for_every_gate(gate, fusion, specialists):
    fused, ids = fuse(specialists, gate=gate, fusion=fusion), prompt()
    outputs = fused(ids)
    assert_same(outputs.gate_weights, naive_gate_weights(fused, specialists, ids))
    assert_same(outputs.logits, naive_logits(fused, specialists, ids, outputs.gate_weights))


@torch.no_grad()
def test_the_gates_of_these_tests_change_their_mind_from_token_to_token(fused):
    weights = fused(prompt()).gate_weights
    assert weights.shape == (2, 9, 3)
    assert len(weights.argmax(-1).unique()) > 1
    assert weights.std(dim=1).min() > 0.05


@torch.no_grad()
def test_a_soft_cap_is_applied_once_and_after_mixing():
    specialists = MIXES["soft caps"]()
    fused, ids = fuse(specialists, gate="uniform"), prompt()
    capped_first = sum(m(ids).logits for m in specialists.values()) / 2
    logits = fused(ids).logits
    assert logits.abs().max() < 1.5
    # the two differ by far more than rounding, so that the sum above cannot hold by accident
    assert (logits - capped_first).abs().max() > 0.1


@torch.no_grad()
def test_mixed_probabilities_are_probabilities(specialists):
    logits = fuse(specialists, fusion="probabilities")(prompt()).logits
    assert_same(logits.exp().sum(-1), torch.ones(2, 9))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("mix", ["one family", "soft caps", "scale factors"])
@torch.no_grad()
def test_a_gate_that_listens_to_one_specialist_makes_the_fused_model_that_specialist(mix, fusion):
    specialists = MIXES[mix]()
    fused, ids = fuse(specialists, gate="constant", fusion=fusion), prompt()
    for name, model in specialists.items():
        prefer(fused, name)
        own = model(ids).logits
        assert_same(fused(ids).logits, own.log_softmax(-1) if fusion == "probabilities" else own)


@torch.no_grad()
def test_gate_weights_are_those_of_the_forward_pass(fused):
    ids, mask = prompt(), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    torch.testing.assert_close(
        fused.gate_weights(ids, attention_mask=mask), fused(ids, attention_mask=mask).gate_weights, rtol=0, atol=0
    )


# ---------------------------------------------------------------------------------------------- cache and padding


def in_chunks(fused, ids, cache, sizes):
    logits = [fused(chunk, past_key_values=cache, use_cache=True).logits for chunk in ids.split(sizes, dim=-1)]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("mix", MIXES)
@torch.no_grad()
def test_token_by_token_with_a_cache_equals_all_at_once_without(mix):
    fused, ids = fuse(MIXES[mix]()), prompt(length=14)
    cache = DynamicCache(config=fused.config)
    assert_same(in_chunks(fused, ids, cache, [6] + [1] * 8), fused(ids, use_cache=False).logits)
    assert cache.get_seq_length() == 14


@pytest.mark.parametrize("mix", MIXES)
@torch.no_grad()
def test_a_long_prompt_may_come_in_chunks(mix):
    fused, ids = fuse(MIXES[mix]()), prompt(length=14)
    assert_same(
        in_chunks(fused, ids, DynamicCache(config=fused.config), [5, 1, 7, 1]), fused(ids, use_cache=False).logits
    )


@torch.no_grad()
def test_a_cache_made_without_a_configuration_serves_as_well(fused):
    ids = prompt(length=12)
    assert_same(in_chunks(fused, ids, DynamicCache(), [5, 4, 1, 1, 1]), fused(ids, use_cache=False).logits)


@pytest.mark.parametrize("mix", MIXES)
@torch.no_grad()
def test_a_static_cache_says_what_a_dynamic_one_says(mix):
    fused, ids = fuse(MIXES[mix]()), prompt(length=12)
    static = StaticCache(config=fused.config, max_cache_len=16)
    assert_same(in_chunks(fused, ids, static, [8, 1, 1, 1, 1]), fused(ids, use_cache=False).logits)


@torch.no_grad()
def test_the_cache_that_comes_back_goes_on(fused):
    ids = prompt()
    first = fused(ids[:, :5])
    second = fused(ids[:, 5:], past_key_values=first.past_key_values)
    assert_same(torch.cat([first.logits, second.logits], dim=1), fused(ids, use_cache=False).logits)
    assert fused(ids, use_cache=False).past_key_values is None


@torch.no_grad()
def test_in_training_no_cache_is_kept_unless_asked_for(fused):
    assert fused.train()(prompt()).past_key_values is None


@pytest.mark.parametrize("mix", MIXES)
@torch.no_grad()
def test_a_row_padded_on_the_left_says_what_it_says_alone(mix):
    fused, ids = fuse(MIXES[mix]()), prompt(length=12)
    mask = torch.ones_like(ids)
    ids[1, :5] = mask[1, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = fused(ids, attention_mask=mask, position_ids=positions).logits
    assert_same(batch[0], fused(ids[:1]).logits[0])
    assert_same(batch[1, 5:], fused(ids[1:, 5:]).logits[0])


# ---------------------------------------------------------------------------------------------- logits and loss


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_only_the_logits_asked_for_are_computed(fusion, specialists):
    fused, ids = fuse(specialists, fusion=fusion), prompt()
    logits = fused(ids).logits
    assert_same(fused(ids, logits_to_keep=2).logits, logits[:, -2:])
    kept = torch.tensor([0, 3, 8])
    assert_same(fused(ids, logits_to_keep=kept).logits, logits[:, kept])


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_the_loss_is_plain_cross_entropy_over_labelled_tokens(fusion, specialists):
    fused, ids = fuse(specialists, fusion=fusion), prompt()
    labels = ids.clone()
    labels[:, :3] = -100
    outputs = fused(ids, labels=labels)
    by_hand = [
        -outputs.logits[row, t - 1].log_softmax(-1)[ids[row, t]].item() for row in range(2) for t in range(3, 9)
    ]
    assert outputs.loss.item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


@torch.no_grad()
def test_the_loss_divides_by_the_number_of_tokens_it_is_told(fused):
    ids = prompt()
    mean, told = fused(ids, labels=ids).loss, fused(ids, labels=ids, num_items_in_batch=torch.tensor(40)).loss
    assert_same(told * 40, mean * 16)


# ---------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_half_precision_says_nearly_the_same_and_weighs_in_float32(fusion, specialists):
    ids = prompt()
    exact = fuse(specialists, fusion=fusion)
    half = fuse(specialists, fusion=fusion, dtype=torch.bfloat16)
    half.model.fusion_gate.load_state_dict(exact.model.fusion_gate.state_dict())
    outputs = half(ids)
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.gate_weights.dtype == torch.float32
    assert {p.dtype for p in half.model.fusion_gate.parameters()} == {torch.float32}
    assert_same(outputs.gate_weights.sum(-1), torch.ones(2, 9))
    assert (outputs.logits - exact(ids).logits).abs().mean() < 0.05


@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_a_model_cast_as_a_whole_still_weighs_in_float32(gate, specialists):
    fused, ids = fuse(specialists, gate=gate), prompt()
    exact = fused(ids).logits
    outputs = fused.to(torch.bfloat16)(ids)
    assert outputs.gate_weights.dtype == torch.float32
    assert_same(outputs.gate_weights.sum(-1), torch.ones(2, 9))
    assert (outputs.logits - exact).abs().mean() < 0.1


@torch.no_grad()
def test_a_model_that_was_cast_in_memory_can_be_fused(specialists):
    ids = prompt()
    exact = fuse(specialists, gate="uniform")(ids).logits
    # rounds the rotary frequencies too, which loading in bfloat16 does not
    cast = {name: model.to(torch.bfloat16) for name, model in specialists.items()}
    assert (fuse(cast, gate="uniform")(ids).logits - exact).abs().mean() < 0.05


@torch.no_grad()
def test_under_autocast_the_gate_still_weighs_in_float32(fused):
    ids = prompt()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = fused(ids)
    assert outputs.gate_weights.dtype == torch.float32
    assert_same(outputs.gate_weights.sum(-1), torch.ones(2, 9))


# ---------------------------------------------------------------------------------------------- views of one prompt


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_views_that_are_all_alike_change_nothing(fusion, specialists):
    fused, ids, mask = fuse(specialists, fusion=fusion), prompt(), torch.ones(2, 9, dtype=torch.long)
    ids[1, :4] = mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    views, masks = (t[:, None].expand(-1, 3, -1) for t in (ids, mask))
    plain = fused(ids, attention_mask=mask, position_ids=positions).logits
    viewed = fused(ids, attention_mask=mask, specialist_input_ids=views, specialist_attention_mask=masks).logits
    assert_same(viewed[0], plain[0])
    assert_same(viewed[1, 4:], plain[1, 4:])


@torch.no_grad()
def test_views_without_a_mask_are_read_from_their_first_token(fused):
    ids = prompt()
    assert_same(fused(ids, specialist_input_ids=ids[:, None].expand(-1, 3, -1)).logits, fused(ids).logits)


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_each_specialist_reads_its_own_view_and_its_own_padding(fusion, specialists):
    fused = fuse(specialists, fusion=fusion)
    views, masks = own_views()
    outputs = fused(views[:, 0], specialist_input_ids=views, specialist_attention_mask=masks)
    for row in range(2):
        # the last three tokens are the shared response
        hidden, logits = [], []
        for k, model in enumerate(specialists.values()):
            alone = views[row : row + 1, k, masks[row, k] == 1]
            hidden.append(model.base_model(alone).last_hidden_state[:, -3:])
            logits.append(model(alone).logits[:, -3:])
        weights = fused.model.fusion_gate(hidden).weights
        own = [words.softmax(-1) if fusion == "probabilities" else words for words in logits]
        total = sum(weights[..., k : k + 1] * words for k, words in enumerate(own))
        assert_same(outputs.gate_weights[row, -3:], weights[0])
        assert_same(outputs.logits[row, -3:], total[0].log() if fusion == "probabilities" else total[0])


def own_views(response=3):
    """Prompts that differ in words and in length, padded on the left, before one response. (batch, specialists, seq)"""
    views = torch.randint(3, 99, (2, 3, 9 + response))
    views[:, :, 9:] = views[:, :1, 9:]
    masks = torch.ones_like(views)
    for row, lengths in enumerate([(0, 2, 5), (4, 0, 1)]):
        for k, padding in enumerate(lengths):
            views[row, k, :padding] = masks[row, k, :padding] = 0
    return views, masks


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [((2, 9), "one row per specialist"), ((2, 2, 9), "one row per specialist"), ((2, 3, 7), "padded on the left")],
)
def test_views_of_another_shape_are_refused(shape, complaint, fused):
    with pytest.raises(ValueError, match=complaint):
        fused(prompt(), specialist_input_ids=torch.ones(shape, dtype=torch.long))


def test_a_mask_of_views_with_another_number_of_specialists_is_refused(fused):
    with pytest.raises(ValueError, match="specialist_attention_mask"):
        fused(prompt(), specialist_attention_mask=torch.ones(2, 4, 9, dtype=torch.long))


def test_embeddings_in_place_of_tokens_are_refused(fused):
    with pytest.raises(ValueError, match="reads token ids"):
        fused(inputs_embeds=torch.zeros(1, 4, 32))


def test_no_tokens_at_all_are_refused(fused):
    with pytest.raises(ValueError, match="`input_ids` is None"):
        fused()


# ---------------------------------------------------------------------------------------------- gradients


def frozen(fused):
    fused.model.specialists.requires_grad_(False)
    fused.lm_head.requires_grad_(False)
    return fused


def test_frozen_specialists_run_without_autograd_while_the_gate_learns(fused):
    seen, ids = [], prompt()
    for backbone in frozen(fused).model.specialists.values():
        backbone.register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state))
    fused(ids, labels=ids).loss.backward()
    assert len(seen) == 3
    assert all(hidden.grad_fn is None for hidden in seen)
    assert all(p.grad.abs().sum() > 0 for n, p in fused.model.fusion_gate.named_parameters())


def test_a_specialist_that_is_not_frozen_learns_while_another_is(fused):
    ids = prompt()
    frozen(fused).model.specialists["code"].requires_grad_(True)
    fused(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in fused.model.specialists["code"].parameters())
    assert all(p.grad is None for p in fused.model.specialists["text"].parameters())


def test_freezing_does_not_change_the_gates_gradients(fused):
    ids = prompt()
    gradients = []
    for _ in range(2):
        fused.zero_grad()
        fused(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in fused.model.fusion_gate.named_parameters()})
        frozen(fused)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients_are_those_of_the_naive_sum(fusion, specialists):
    fused, ids = fuse(specialists, fusion=fusion), prompt()
    fused(ids, labels=ids).loss.backward()
    learned = {n: p.grad.clone() for n, p in fused.named_parameters()}
    fused.zero_grad()
    logits = naive_logits(fused, specialists, ids, naive_gate_weights(fused, specialists, ids))
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert_same(
        {n: p.grad for n, p in fused.model.fusion_gate.named_parameters()}, part(learned, "model.fusion_gate.")
    )
    widths = [m.config.hidden_size for m in specialists.values()]
    for (name, model), columns in zip(
        specialists.items(), learned["lm_head.weight"].split(widths, dim=-1), strict=True
    ):
        expected = {n: p.grad for n, p in model.base_model.named_parameters()}
        actual = part(learned, f"model.specialists.{name}.")
        if model.config.tie_word_embeddings:
            # its embedding is also its head, which the fused model holds apart
            actual["embed_tokens.weight"] = actual["embed_tokens.weight"] + columns
        else:
            assert_same(columns, model.lm_head.weight.grad)
        assert_same(actual, expected)


def part(tensors, prefix):
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


@pytest.mark.parametrize("mix", ["one family", "windows"])
def test_gradient_checkpointing_gives_the_same_gradients(mix):
    fused, ids = fuse(MIXES[mix]()).train(), prompt()
    gradients = []
    for _ in range(2):
        fused.zero_grad()
        fused(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in fused.named_parameters()})
        fused.gradient_checkpointing_enable()
    assert_same(*gradients)


# ---------------------------------------------------------------------------------------------- the library's options


# one layer each: tracing is slow
SHALLOW = {
    "full attention": lambda: {
        "text": specialist("llama", layers=1),
        "code": specialist("llama", layers=1, tied=True),
    },
    "windows": lambda: {
        "text": specialist("mistral", layers=1, sliding_window=4),
        "code": specialist("qwen2", layers=1),
    },
}


@pytest.mark.parametrize(("mix", "fusion"), [("full attention", "logits"), ("windows", "probabilities")])
@torch.no_grad()
def test_the_forward_pass_compiles_to_one_graph(mix, fusion):
    fused, ids = fuse(SHALLOW[mix](), fusion=fusion), prompt()
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    assert_same(compiled(ids, use_cache=False).logits, fused(ids, use_cache=False).logits)


@torch.no_grad()
def test_a_step_with_a_static_cache_compiles_to_one_graph():
    fused, ids = fuse(SHALLOW["full attention"]()), prompt()
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    cache = StaticCache(config=fused.config, max_cache_len=16)
    fused(ids[:, :-1], past_key_values=cache, use_cache=True)
    step = compiled(ids[:, -1:], past_key_values=cache, use_cache=True).logits
    assert_same(step, fused(ids, use_cache=False).logits[:, -1:])


@pytest.mark.parametrize("rows", [120, 80])
@torch.no_grad()
def test_a_new_vocabulary_size_reaches_every_specialist_and_the_head(rows, fused):
    ids = torch.randint(3, min(rows, 99), (2, 9))
    before, kept = fused(ids).logits, min(rows, 99)
    fused.resize_token_embeddings(rows, mean_resizing=False)
    assert [s.get_input_embeddings().weight.shape[0] for s in fused.model.specialists.values()] == [rows] * 3
    assert fused.lm_head.weight.shape[0] == fused.config.vocab_size == fused.vocab_size == rows
    assert [c.vocab_size for c in fused.config.specialists] == [rows] * 3
    logits = fused(ids, labels=ids).logits
    assert logits.shape[-1] == rows
    assert_same(logits[..., :kept], before[..., :kept])


@torch.no_grad()
def test_a_new_token_can_be_read_after_growing(fused):
    fused.resize_token_embeddings(110, mean_resizing=False)
    assert fused(torch.full((1, 4), 109)).logits.isfinite().all()


@torch.no_grad()
def test_a_resized_model_survives_saving(fused, tmp_path):
    fused.resize_token_embeddings(110, mean_resizing=False)
    fused.save_pretrained(tmp_path)
    again, ids = UltraFuserForCausalLM.from_pretrained(tmp_path), prompt()
    torch.testing.assert_close(again(ids).logits, fused(ids).logits, rtol=0, atol=0)


@torch.no_grad()
def test_hidden_states_are_every_specialists_own_one_after_another_and_last_the_fused(specialists):
    fused, ids = fuse(specialists), prompt()
    expected = [h for m in specialists.values() for h in m(ids, output_hidden_states=True).hidden_states]
    expected.append(fused.model(ids).last_hidden_state)
    assert_same(list(fused(ids, output_hidden_states=True).hidden_states), expected)
    assert fused(ids).hidden_states is None


@torch.no_grad()
def test_attentions_are_every_specialists_own_one_after_another(specialists):
    fused, ids = fuse(specialists, attn_implementation="eager"), prompt()
    for model in specialists.values():
        model.set_attn_implementation("eager")
    expected = [a for m in specialists.values() for a in m(ids, output_attentions=True).attentions]
    assert_same(list(fused(ids, output_attentions=True).attentions), expected)
    assert fused(ids).attentions is None


@torch.no_grad()
def test_a_tuple_holds_what_the_named_output_holds(fused):
    ids = prompt()
    named = fused(ids, labels=ids, use_cache=False)
    loss, logits, gate_weights = fused(ids, labels=ids, use_cache=False, return_dict=False)
    torch.testing.assert_close([loss, logits, gate_weights], [named.loss, named.logits, named.gate_weights])
    assert isinstance(fused.model(ids, return_dict=False), tuple)


@pytest.mark.parametrize("mix", ["one family", "three families", "windows", "scale factors", "experts"])
@torch.no_grad()
def test_both_attention_implementations_agree_and_the_choice_reaches_every_specialist(mix):
    fused, ids = fuse(MIXES[mix](), attn_implementation="sdpa"), prompt(length=12)
    logits = {}
    for implementation in ("sdpa", "eager"):
        fused.set_attn_implementation(implementation)
        assert {s.config._attn_implementation for s in fused.model.specialists.values()} == {implementation}
        logits[implementation] = fused(ids).logits
    assert_same(logits["eager"], logits["sdpa"])


@torch.no_grad()
def test_the_wide_head_on_the_backbones_output_gives_the_logits(fused):
    ids = prompt()
    assert_same(fused.lm_head(fused.model(ids).last_hidden_state), fused(ids).logits)


# ---------------------------------------------------------------------------------------------- a specialist back


@pytest.mark.parametrize("mix", MIXES)
@torch.no_grad()
def test_a_specialist_had_back_is_the_model_that_went_in(mix):
    specialists = MIXES[mix]()
    fused, ids = fuse(specialists), prompt()
    for name, model in specialists.items():
        back = fused.specialist(name)
        assert type(back) is type(model)
        assert_same(back(ids).logits, model(ids).logits)


@pytest.mark.parametrize("mix", ["one family", "scale factors"])
def test_a_specialist_had_back_shares_the_fused_models_tensors(mix):
    fused = fuse(MIXES[mix]())
    start = 0
    for name in fused.config.specialist_names:
        back, backbone = fused.specialist(name), fused.model.specialists[name]
        theirs = [p.data_ptr() for p in back.base_model.parameters()]
        assert theirs == [p.data_ptr() for p in backbone.parameters()]
        head = back.get_output_embeddings().weight
        assert head.untyped_storage().data_ptr() == fused.lm_head.weight.untyped_storage().data_ptr()
        assert head.storage_offset() == start
        start += head.shape[1]


@pytest.mark.parametrize("mix", ["one family", "soft caps", "scale factors", "experts"])
@torch.no_grad()
def test_a_specialist_had_back_can_be_saved_as_an_ordinary_model(mix, tmp_path):
    specialists = MIXES[mix]()
    fused, ids = fuse(specialists), prompt()
    for name, model in specialists.items():
        fused.specialist(name).save_pretrained(tmp_path / name)
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert type(stock) is type(model)
        assert_same(stock(ids).logits, model(ids).logits)


@torch.no_grad()
def test_having_a_specialist_back_changes_nothing_in_the_fused_model(fused):
    ids = prompt()
    before, config = fused(ids).logits, fused.config.to_dict()
    fused.specialist("code")(ids)
    torch.testing.assert_close(fused(ids).logits, before, rtol=0, atol=0)
    assert fused.config.to_dict() == config


def test_an_unknown_specialist_is_refused_with_the_choices(fused):
    with pytest.raises(KeyError, match=r"no specialist 'law'.*'text', 'code', 'math'"):
        fused.specialist("law")


@torch.no_grad()
def test_models_in_memory_stay_their_owners(specialists):
    fused, ids = fuse(specialists), prompt()
    before = specialists["code"](ids).logits
    for parameter in fused.parameters():
        parameter.zero_()
    assert torch.equal(specialists["code"](ids).logits, before)


@torch.no_grad()
def test_what_a_backbone_computes_when_it_is_built_is_there_after_fusing_and_loading(tmp_path):
    # Falcon-H1 is never given these numbers by a checkpoint: loading must compute them
    shape = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
    hybrid = specialist("falcon_h1", ssm_multipliers=[0.5, 2.0, 0.7, 3.0, 1.5], lm_head_multiplier=0.5, **shape)
    fused, ids = fuse({"text": hybrid, "code": specialist()}), prompt()
    assert_same(fused.specialist("text")(ids).logits, hybrid(ids).logits)
    fused.save_pretrained(tmp_path)
    again = UltraFuserForCausalLM.from_pretrained(tmp_path)
    assert_same(again(ids).logits, fused(ids).logits)


@torch.no_grad()
def test_a_family_with_a_width_for_each_layer_can_be_fused():
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4}
    small = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99, "laurel_rank": 8}
    model = specialist("gemma3n_text", layers=4, sliding_window=4, num_kv_shared_layers=2, **layers, **small)
    fused, ids = fuse({"text": model, "code": model}), prompt()
    assert_same(fused(ids).logits, model(ids).logits)
    cache = DynamicCache(config=fused.config)
    assert_same(in_chunks(fused, ids, cache, [5, 1, 1, 1, 1]), model(ids).logits)


@torch.no_grad()
def test_rows_beyond_the_smallest_vocabulary_are_cut():
    specialists = {"text": specialist(vocab_size=99), "code": specialist(vocab_size=104, tied=True)}
    fused, ids = fuse(specialists, gate="uniform"), prompt()
    expected = sum(m(ids).logits[..., :99] for m in specialists.values()) / 2
    assert_same(fused(ids).logits, expected)


def test_a_gate_weight_that_rounds_to_nothing_has_a_gradient(specialists):
    fused = UltraFuserForCausalLM.from_specialists(specialists, fusion="probabilities", gate="constant")
    (numbers,) = fused.model.fusion_gate.parameters()
    numbers.data[0] = 200.0
    ids = prompt()
    fused(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in fused.parameters())
    with torch.no_grad():
        assert torch.allclose(fused(ids).logits, fused.specialist("text")(ids).logits.log_softmax(-1), atol=1e-5)
