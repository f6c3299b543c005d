"""A specialist drafts, the others check, and nothing about the text gives it away."""

import pytest
import torch
from scipy import stats
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer, logits_process

from tests.support.fusions import MIXTURES
from tests.support.mixes import MIXES, fuse, prefer, prompt
from tests.support.tiny import specialist, tokenizer
from ultrafuser.decoding import drafting
from ultrafuser.decoding.drafting import STATELESS, _said_before, self_draft, verified
from ultrafuser.decoding.stacking import stack


STEPS = 12
DRAWS = 300


def generate(fused, ids, **options):
    return fused.generate(ids, **{"max_new_tokens": STEPS, "do_sample": False} | options)


def draft(fused, ids, num_drafts=4, **options):
    return generate(fused, ids, custom_generate=self_draft, num_drafts=num_drafts, **options)


def passes(fused, run):
    """How often each specialist runs."""
    counts = dict.fromkeys(fused.config.specialist_names, 0)
    hooks = [
        m.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
        for name, m in fused.model.specialists.items()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return counts


# ---------------------------------------------------------------------------------------------- greedy


@pytest.mark.grid
@pytest.mark.parametrize("fusion", MIXTURES)
@pytest.mark.parametrize("mix", MIXES)
def test_greedy_tokens_are_those_of_the_plain_way(mix, fusion):
    # longer than every window
    fused, ids = fuse(MIXES[mix](), fusion=fusion), prompt(batch=1, length=12)
    assert torch.equal(draft(fused, ids), generate(fused, ids))


@pytest.mark.grid
@pytest.mark.parametrize("num_drafts", [1, 2, 7, 50])
def test_blocks_of_any_length_change_no_token(num_drafts):
    fused, ids = fuse(MIXES["one family"]()), prompt(batch=1)
    assert torch.equal(draft(fused, ids, num_drafts), generate(fused, ids))


def test_processors_see_the_text_up_to_each_token():
    fused, ids = fuse(MIXES["one family"]()), prompt(batch=1)
    options = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 2}
    expected = generate(fused, ids, **options)
    assert not torch.equal(expected, generate(fused, ids))
    assert torch.equal(draft(fused, ids, **options), expected)


def test_padding_on_the_left_changes_no_token():
    fused, ids = fuse(MIXES["one family"]()), prompt(batch=1, length=12)
    mask = torch.ones_like(ids)
    ids[:, :5] = mask[:, :5] = 0
    assert torch.equal(draft(fused, ids, attention_mask=mask)[:, 5:], generate(fused, ids[:, 5:]))


def test_a_text_ends_within_a_block():
    fused, ids = fuse(MIXES["one family"]()), prompt(batch=1)
    for end in generate(fused, ids)[0, ids.shape[1] : ids.shape[1] + 5].tolist():
        fused.generation_config.eos_token_id = end
        assert torch.equal(draft(fused, ids), generate(fused, ids))


def test_a_conversation_goes_on_from_its_cache():
    fused, ids = fuse(MIXES["windows"]()), prompt(batch=1)
    first = draft(fused, ids, return_dict_in_generate=True, past_key_values=DynamicCache())
    assert torch.equal(first.sequences, generate(fused, ids))
    longer = torch.cat([first.sequences, prompt(batch=1, length=5)], dim=-1)
    # or the library would take token 0 within the text for padding
    whole = {"attention_mask": torch.ones_like(longer)}
    continued = draft(fused, longer, past_key_values=first.past_key_values, **whole)
    assert torch.equal(continued, generate(fused, longer, use_cache=False, **whole))


@pytest.mark.grid
@pytest.mark.parametrize("mix", MIXES)
def test_a_batch_gives_each_text_the_tokens_that_it_has_alone(mix):
    fused, ids = fuse(MIXES[mix]()), prompt(batch=3, length=12)
    mask = torch.ones_like(ids)
    ids[0, :5] = mask[0, :5] = 0
    plain = generate(fused, ids, attention_mask=mask)
    # one of them ends early
    fused.generation_config.eos_token_id = fused.generation_config.pad_token_id = plain[1, -STEPS + 3].item()
    drafted = draft(fused, ids, attention_mask=mask)
    assert torch.equal(drafted, generate(fused, ids, attention_mask=mask))
    alone = draft(fused, ids[2:])
    assert torch.equal(drafted[2:, : alone.shape[1]], alone)


# ---------------------------------------------------------------------------------------------- passes


def test_a_drafter_that_is_always_right_takes_one_pass_a_token_and_the_others_one_a_block():
    fused, ids = fuse(MIXES["one family"](), gate="constant"), prompt(batch=1)
    prefer(fused, "code")
    # the prompt gives the first token, blocks of 4, 6 and 8 the rest
    counts = passes(fused, lambda: draft(fused, ids, max_new_tokens=19))
    assert counts == {"text": 1 + 3, "code": 1 + 18, "math": 1 + 3}


def test_the_drafter_is_the_specialist_that_the_gate_prefers_at_the_last_token(monkeypatch):
    fused, ids = fuse(MIXES["one family"](), gate_temperature=0.1), prompt(batch=1)
    text = generate(fused, ids)
    favourites = fused.gate_weights(text)[0].argmax(-1)
    rounds, plain = [], drafting.drafted_by
    monkeypatch.setattr(
        drafting,
        "drafted_by",
        lambda reader, k, text, *more: rounds.append((k, text)) or plain(reader, k, text, *more),
    )
    assert torch.equal(draft(fused, ids), text)
    # the gate's last word before the text's last token
    assert [k for k, _ in rounds] == [favourites[t.shape[1] - 2] for _, t in rounds]
    assert len({k for k, _ in rounds}) > 1


# ---------------------------------------------------------------------------------------------- sampling


def test_what_is_verified_is_distributed_as_the_target():
    """Every outcome's probability, counted out: the draft and its fate are drawn many times at once."""
    torch.manual_seed(0)
    target, proposed = torch.randn(2, 1, 5) * 2
    target[0, 3] = float("-inf")
    drafts = torch.multinomial(proposed[0].softmax(-1), 4_000, replacement=True)
    each = (4_000, 1, 5)
    drawn = verified(drafts[:, None], proposed.expand(each), target.expand(each), sample=True)[0][:, 0]
    expected = target[0].double().softmax(-1)
    seen = torch.bincount(drawn, minlength=5)
    assert seen[3] == 0
    kept = expected > 0
    assert stats.chisquare(seen[kept], expected[kept] * len(drawn)).pvalue > 0.01


def test_verifying_keeps_what_comes_before_the_first_rejection():
    proposed = torch.zeros(3, 4)
    target = torch.zeros(3, 4)
    target[1, 2] = float("-inf")  # the second draft is impossible
    for _ in range(20):
        [tokens], accepted = verified(torch.tensor([[1, 2, 3]]), proposed[None], target[None], sample=True)
        assert accepted == 1
        assert tokens[0] == 1
        assert tokens[1] != 2
        assert len(tokens) == 2


def test_a_round_ends_where_the_first_text_rejects_and_a_finished_one_rejects_nothing():
    drafts = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    proposed = torch.zeros(3, 3, 4)
    target = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3], [1, 0, 3], [0, 2, 3]]), 4).float()
    for live, expected in {
        (True, True, True): [[1], [1], [0]],
        (True, True, False): [[1, 2], [1, 0], [1, 2]],
        (True, False, False): drafts.tolist(),
    }.items():
        tokens, accepted = verified(drafts, proposed, target, False, torch.tensor(live))
        assert tokens.tolist() == expected
        assert accepted == (len(expected[0]) - 1 if len(expected[0]) < 3 else 3)


def test_a_token_comes_with_drafts_that_are_read_to_the_end_and_all_accepted():
    target = torch.nn.functional.one_hot(torch.tensor([[1, 2, 0]]), 4).float()
    assert verified(torch.tensor([[1, 2]]), torch.zeros(1, 2, 4), target, False)[0].tolist() == [[1, 2, 0]]
    assert verified(torch.tensor([[1, 3]]), torch.zeros(1, 2, 4), target, False)[0].tolist() == [[1, 2]]


def test_a_text_that_repeats_itself_is_guessed_to_go_on_as_it_did():
    ids = torch.tensor([[7, 1, 2, 3, 4, 5, 1, 2, 3, 6, 1, 2, 3]])
    assert _said_before(ids, 2).tolist() == [[6, 1]]  # the last time counts
    assert _said_before(ids[:, :9], 8).tolist() == [[4, 5, 1, 2, 3]]
    for nothing in (_said_before(ids[:, :6], 8), _said_before(ids, 0), _said_before(ids.expand(2, -1), 8)):
        assert nothing.shape[1] == 0


@pytest.mark.e2e
@pytest.mark.parametrize("fusion", ["logits", pytest.param("probabilities", marks=pytest.mark.slow)])
@torch.no_grad()
def test_sampled_texts_are_distributed_as_the_fused_model_says(fusion):
    small = {"vocab_size": 4, "hidden_size": 8, "layers": 1, "bos_token_id": 0, "eos_token_id": 1}
    fused = fuse({"text": specialist(**small), "code": specialist(**small)}, fusion=fusion)
    ids, config = torch.tensor([[2, 3, 0]]), GenerationConfig(max_length=6, do_sample=True)
    # all texts of three tokens, and how likely each is
    texts = torch.cartesian_prod(*[torch.arange(4)] * 3)
    logits = fused(torch.cat([ids.expand(64, -1), texts], dim=-1)).logits[:, 2:-1].double()
    expected = logits.log_softmax(-1).gather(-1, texts[..., None]).sum((1, 2)).exp()
    seen = torch.zeros(64, dtype=torch.double)
    stop = StoppingCriteriaList([MaxLengthCriteria(6)])
    torch.manual_seed(0)
    for batch in [1] * (DRAWS // 2) + [3] * (DRAWS // 6):
        for text in self_draft(fused, ids.expand(batch, -1), LogitsProcessorList(), stop, config, num_drafts=2)[:, 3:]:
            seen[(text * torch.tensor([16, 4, 1])).sum()] += 1
    # texts too rare to be told apart are counted together
    rare = expected * DRAWS < 5
    seen, expected = (torch.cat([t[~rare], t[rare].sum()[None]]) for t in (seen, expected))
    assert len(seen) > 8
    assert stats.chisquare(seen, expected * DRAWS / expected.sum()).pvalue > 0.01


# ---------------------------------------------------------------------------------------------- refused


def test_what_cannot_be_drafted_is_refused_with_the_way_out():
    fused, ids = fuse(MIXES["one family"]()), prompt(batch=1)
    with pytest.raises(ValueError, match="one continuation of a text, but got num_beams=2"):
        draft(fused, ids, num_beams=2)
    with pytest.raises(ValueError, match="`num_drafts` counts.*but it is 0"):
        draft(fused, ids, num_drafts=0)
    with pytest.raises(ValueError, match="cache that can go back, but got a StaticCache"):
        draft(fused, ids, cache_implementation="static")
    with pytest.raises(ValueError, match="returns tokens, but got.*output_scores"):
        draft(fused, ids, output_scores=True, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="this is a StackedForCausalLM"):
        draft(stack(fuse({n: specialist() for n in ("text", "code")})), ids)


def test_recurrent_specialists_are_refused():
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    types = ["linear_attention", "full_attention"]
    hybrid = specialist("qwen3_5_text", layer_types=types, linear_value_head_dim=8, **linear)
    with pytest.raises(ValueError, match="recurrent specialist cannot go back"):
        draft(fuse({"text": specialist(), "code": hybrid}), prompt(batch=1))


# ---------------------------------------------------------------------------------------------- beside options


def guided(ids, scores):
    """A processor of one's own."""
    return scores


@pytest.mark.grid
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"guidance_scale": 1.7}, "UnbatchedClassifierFreeGuidance"),
        ({"logits_processor": LogitsProcessorList([guided])}, "function"),
        ({"prefix_allowed_tokens_fn": lambda _, text: [5, 6]}, "PrefixConstrained"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search"),
        ({"force_words_ids": [[5]], "num_beams": 2}, "num_beams=2"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"token_type_ids": torch.zeros(1, 12, dtype=torch.long)}, "token_type_ids"),
    ],
)
def test_what_drafts_would_change_is_refused_by_name(options, named):
    fused, ids = fuse(MIXES["one family"]()), prompt(batch=1, length=12)
    with pytest.raises(ValueError, match=named):
        draft(fused, ids, **options)


@pytest.mark.grid
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "encoder_repetition_penalty": 1.2},
        {"bad_words_ids": [[5, 6], [7]], "sequence_bias": [[[9], 2.0]], "suppress_tokens": [8]},
        {
            "begin_suppress_tokens": [5],
            "forced_eos_token_id": 2,
            "exponential_decay_length_penalty": (3, 1.1),
            "eos_token_id": 2,
        },
        {"renormalize_logits": True, "remove_invalid_values": True, "min_length": 20},
        {"do_sample": True, "top_k": 1, "min_p": 0.1, "top_p": 0.9, "typical_p": 0.9, "epsilon_cutoff": 0.01},
        {"prompt_lookup_num_tokens": 3},
        {"max_time": 60.0},
    ],
)
def test_options_beside_drafts_give_the_tokens_of_the_plain_way(options):
    fused, ids = fuse(MIXES["one family"]()), prompt(batch=1)
    assert torch.equal(draft(fused, ids, **options), generate(fused, ids, **options))


def test_every_processor_that_drafts_pass_through_is_the_librarys():
    known = {n for n in dir(logits_process) if n.endswith(("LogitsProcessor", "LogitsWarper")) or n in STATELESS}
    short = {n.removesuffix("LogitsProcessor").removesuffix("LogitsWarper") for n in known}
    assert STATELESS - {"TopH"} <= short  # which the oldest versions lack


def test_a_text_ends_at_a_string():
    fused, tok = fuse(MIXES["one family"]()), tokenizer()
    ids = tok(["hello world"], return_tensors="pt").input_ids
    plain = generate(fused, ids)
    stop = {"stop_strings": [tok.decode(plain[0, ids.shape[1] + 4])], "tokenizer": tok}
    expected = generate(fused, ids, **stop)
    assert expected.shape[1] < plain.shape[1]
    assert torch.equal(draft(fused, ids, **stop), expected)


class Heard(BaseStreamer):
    """Keeps what it hears."""

    def __init__(self):
        self.tokens, self.ends = [], 0

    def put(self, value):
        """Keeps tokens."""
        self.tokens += value.flatten().tolist()

    def end(self):
        """Counts ends."""
        self.ends += 1


def test_a_streamer_hears_every_token_and_the_end():
    fused, ids, heard = fuse(MIXES["one family"]()), prompt(batch=1), Heard()
    text = draft(fused, ids, streamer=heard)
    assert (heard.tokens, heard.ends) == (text[0].tolist(), 1)


@pytest.mark.grid
@pytest.mark.parametrize("way", ["plain", "drafts", "beams"])
def test_a_streamer_hears_the_end_when_generating_fails(way):
    fused, ids, heard = fuse(MIXES["one family"]()), prompt(batch=1), Heard()
    options = {"drafts": {"custom_generate": self_draft, "num_drafts": 0}, "beams": {"num_beams": 2}}.get(way, {})
    if way == "plain":
        fused.model.fusion_gate.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises((ValueError, ZeroDivisionError)):
        generate(fused, ids, streamer=heard, **options)
    assert heard.ends


def test_a_function_of_ones_own_that_takes_no_streamer_runs_as_before():
    fused, ids = fuse(MIXES["one family"]()), prompt(batch=1)

    def at_once(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        return input_ids

    assert torch.equal(generate(fused, ids, custom_generate=at_once, streamer=Heard()), ids)


def test_a_stacked_model_refuses_continuous_batching_at_once():
    stacked = stack(fuse({"text": specialist("llama", layers=1), "code": specialist("llama", layers=1)}))
    with pytest.raises(ValueError, match="no paged cache.*unstack"):
        stacked.generate_batch([[5, 6, 7]], generation_config=GenerationConfig(max_new_tokens=2))
