"""Specialists to whom the gate does not listen are left out for a few tokens, and catch up exactly."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from modeling_ultrafuser.evidence_ultrafuser import layer_of, read_evidence
from modeling_ultrafuser.gate_base_ultrafuser import Gate, Reads, run_before_specialists
from modeling_ultrafuser.gates_ultrafuser import GATES
from modeling_ultrafuser.inputs_ultrafuser import Tokens
from modeling_ultrafuser.sparsifiers_ultrafuser import sparsifier
from tests.modeling.test_longrope import SWITCH, longrope
from tests.support.fusions import MIXTURES
from tests.support.mixes import MIXES, fuse, prefer, prompt
from tests.support.tiny import GATE_WORDS, specialist, tokenizer
from tests.ultrafuser.decoding.test_drafting import Heard, passes
from ultrafuser.build.specialist_edits import remove_specialist
from ultrafuser.decoding.dropping import Asked, drop_specialists
from ultrafuser.decoding.reading import TextReader
from ultrafuser.decoding.stacking import stack


STEPS = 9
ALL_GATES = {
    **{word: {"gate": word} for word in GATE_WORDS},
    "cross+calibration": {"gate": "cross", "gate_calibration": True},
}


def generate(fused, ids, **options):
    return fused.generate(ids, **{"max_new_tokens": STEPS, "do_sample": False} | options)


def drop(fused, ids, keep="top_k:1", every=4, **options):
    return generate(fused, ids, custom_generate=drop_specialists, keep=keep, every=every, **options)


class Same(LogitsProcessor):
    """Not the library's, so that nothing is drafted."""

    def __call__(self, input_ids, scores):
        return scores


def one_by_one(fused, ids, *args, **options):
    return drop(fused, ids, *args, logits_processor=LogitsProcessorList([Same()]), **options)


class Parity(Gate):
    """All weight on the first specialist where texts begin with an even token, else on the second; none on the third."""

    reads = Reads.PROMPT

    def scores(self, hidden_states):
        odd = hidden_states[0][..., 0] % 2
        return 1e3 * torch.stack([1 - odd, odd, -torch.ones_like(odd)], -1)


# ---------------------------------------------------------------------------------------------- nobody is left out


@pytest.mark.grid
@pytest.mark.parametrize("options", ALL_GATES.values(), ids=ALL_GATES)
@pytest.mark.parametrize("fusion", MIXTURES)
def test_keeping_everybody_gives_the_plain_tokens(fusion, options):
    fused, ids = fuse(MIXES["one family"](), fusion=fusion, **options), prompt(batch=2)
    expected = generate(fused, ids)
    assert torch.equal(drop(fused, ids, "top_p:1.0", 4), expected)
    # at every token a decision: nobody answers alone
    assert torch.equal(drop(fused, ids, "top_k:1", 1), expected)


@pytest.mark.grid
@pytest.mark.parametrize("mix", MIXES)
def test_keeping_everybody_gives_the_plain_draws(mix):
    fused, ids, drawn = fuse(MIXES[mix]()), prompt(batch=2, length=12), []
    for options in ({}, {"custom_generate": drop_specialists, "keep": "top_p:1.0"}):
        torch.manual_seed(3)
        drawn.append(generate(fused, ids, do_sample=True, top_k=0, **options))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], generate(fused, ids))


# ---------------------------------------------------------------------------------------------- some are left out


@torch.no_grad()
def naive(fused, ids, keep, every, anew=None):
    """One text, read anew by all specialists at every token, of which those that are out are forgotten.

    At the length `anew` all are asked in any case.
    """
    backbone, gate = fused.model, fused.model.fusion_gate
    for step in range(STEPS):
        # the first decision is for one token
        since = (step - 1) % every if step else 0
        states = [o.last_hidden_state for o in backbone.reader.read(Tokens(ids), None)]
        evidence = read_evidence(backbone, states, Tokens(ids), None)
        ahead = run_before_specialists(gate, ids)
        fused_states, output = backbone.weighed(states, *evidence, gate_output=ahead)
        if ids.shape[1] == anew or not since:
            held = tuple(e[:, -1:] for e in evidence)
        if not since:
            # of the prompt, its last token
            kept = sparsifier(keep).chosen(output.weights[:, -min(every, step + 1) :].mean(1))[0]
            means = [s[:, -every:].mean(1, keepdim=True) for s in states]
        if ids.shape[1] == anew or not since or kept.all():
            logits = fused.logits(fused_states, output.weights)[:, -1]
        else:
            mixed = [s[:, -1:] if kept[k] else means[k] for k, s in enumerate(states)]
            prior = {"prior": kept[None]}
            output = run_before_specialists(gate, ids[:, -1:], **prior) or gate(mixed, *held, **prior)
            assert (output.weights[0, 0] > 0).tolist() == kept.tolist()
            # what is out has no weight, and so no part in the plain mixture either
            alone, _ = backbone.weighed(mixed, gate_output=output)
            logits = fused.logits(alone, output.weights)[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=-1)
    return ids


@pytest.mark.grid
@pytest.mark.parametrize("options", ALL_GATES.values(), ids=ALL_GATES)
@pytest.mark.parametrize("fusion", MIXTURES)
def test_tokens_are_those_of_the_rule_written_out(fusion, options):
    fused, ids = fuse(MIXES["one family"](), fusion=fusion, **options), prompt(batch=1)
    for keep, every in (("top_k:1", 4), ("top_k:2", 3), ("top_k:2", 7)):
        assert torch.equal(drop(fused, ids, keep, every), naive(fused, ids, keep, every))


@pytest.mark.grid
@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix != "one family"])
def test_tokens_are_those_of_the_rule_in_every_family(mix):
    fused, ids = fuse(MIXES[mix]()), prompt(batch=1, length=12)
    for keep in ("top_k:1", "top_k:2"):
        assert torch.equal(drop(fused, ids, keep), naive(fused, ids, keep, 4))


@pytest.mark.parametrize("gate", ["mlp", "evidence"])
def test_who_lags_behind_reads_the_text_anew_where_the_rotation_changes(gate):
    parts = {"text": specialist("llama", layers=1), "code": longrope(), "math": specialist("llama")}
    fused, ids = fuse(parts, gate=gate), prompt(batch=1, length=SWITCH - 5)
    for every in (4, 5):
        assert torch.equal(drop(fused, ids, every=every), naive(fused, ids, "top_k:1", every, SWITCH + 1))


@pytest.mark.parametrize("gate", ["mlp", "constant", "uniform"])
def test_between_decisions_it_is_the_fused_model_without_the_others(gate):
    fused, ids = fuse(MIXES["one family"](), gate=gate), prompt(batch=1)
    text = drop(fused, ids, "top_k:2", 10**9)
    first = generate(fused, ids, max_new_tokens=2)
    # of equals the last
    weights = fused.gate_weights(first[:, :-1])[0, -2:].mean(0)
    out = fused.config.specialist_names[2 - int(weights.flip(0).argmin())]
    less = remove_specialist(fused, out).eval()
    assert torch.equal(text, generate(less, first, max_new_tokens=STEPS - 2))
    assert not torch.equal(text, generate(fused, ids))


def test_a_gate_that_listens_to_one_gives_that_ones_own_tokens():
    fused, ids = fuse(MIXES["one family"](), gate="constant"), prompt(batch=2)
    prefer(fused, "code")
    own = generate(fused.specialist("code"), ids, eos_token_id=None, pad_token_id=0)
    assert torch.equal(drop(fused, ids, "top_p:0.8", 8), own)


@pytest.mark.parametrize(("keep", "size"), [("top_k:1", 1), ("top_k:2", 2), ("top_k:3", 3)])
def test_reads_are_those_of_the_formula(keep, size):
    """All at the first token, the second and every n-th from there, and at the others those that are kept."""
    fused, ids = fuse(MIXES["one family"](), gate="constant"), prompt(batch=1)
    fused.model.fusion_gate.logits.data = torch.tensor([3.0, 2.0, 1.0])
    # drawn, so that nothing is drafted
    counts = passes(fused, lambda: drop(fused, ids, keep, 4, max_new_tokens=12, do_sample=True, eos_token_id=None))
    assert sorted(counts.values()) == sorted([12] * size + [4] * (3 - size))


@pytest.mark.parametrize("gate", ["mlp", "evidence"])
def test_everybody_is_asked_before_a_text_ends(gate):
    fused, ids = fuse(MIXES["one family"](), gate=gate), prompt(batch=1)
    alone = drop(fused, ids, every=10**9)
    # a token that the one which is kept predicts, first at this length
    at = next(n for n in range(ids.shape[1] + 3, alone.shape[1]) if alone[0, n] not in alone[0, ids.shape[1] : n])
    end, texts = int(alone[0, at]), []
    counts = passes(fused, lambda: texts.append(drop(fused, ids, every=10**9, eos_token_id=end, pad_token_id=0)))
    assert torch.equal(texts[0][:, :at], alone[:, :at])
    by_all = int(fused(alone[:, :at]).logits[0, -1].argmax())
    assert int(texts[0][0, at]) == by_all
    # the prompt, the first token, and where the text would have ended
    assert min(counts.values()) >= 3
    assert by_all == end or texts[0].shape[1] > at + 1


# ---------------------------------------------------------------------------------------------- caches


@pytest.mark.grid
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("gate", ["mlp", "evidence"])
@pytest.mark.parametrize("keep", ["top_k:1", "top_k:2"])
@torch.no_grad()
def test_caches_that_lagged_behind_are_those_of_one_pass(mix, gate, keep):
    fused, ids = fuse(MIXES[mix](), gate=gate), prompt(batch=2, length=12)
    done = drop(fused, ids, keep, every=4, max_new_tokens=9, return_dict_in_generate=True)
    cache = done.past_key_values
    # decisions after 12, 13 and 17 tokens: all have read so many, or all but the last if both texts together keep everybody
    read = next(layer.get_seq_length() for layer in cache.layers if layer.keys is not None)
    assert read in (17, 20)
    assert {len(layer.past.states[0]) for layer in cache.layers if hasattr(layer, "past")} <= {read}
    plain = DynamicCache(config=fused.config)
    fused(done.sequences[:, :read], past_key_values=plain, use_cache=True)
    for own, expected in zip(cache.layers, plain.layers, strict=True):
        if own.keys is not None:
            assert own.get_seq_length() == read
            last = min(own.keys.shape[2], expected.keys.shape[2])
            torch.testing.assert_close(own.keys[:, :, -last:], expected.keys[:, :, -last:], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(own.values[:, :, -last:], expected.values[:, :, -last:], atol=1e-5, rtol=1e-5)
    if gate == "evidence":
        ours, theirs = (layer_of(c).past for c in (cache, plain))
        torch.testing.assert_close(ours.evidence[:, -1], theirs.evidence[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.grid
@pytest.mark.parametrize("gate", ["mlp", "evidence"])
def test_a_conversation_goes_on_from_its_cache(gate):
    fused, ids = fuse(MIXES["windows"](), gate=gate), prompt(batch=1)
    first = drop(fused, ids, return_dict_in_generate=True, past_key_values=DynamicCache())
    longer = torch.cat([first.sequences, prompt(batch=1, length=5)], dim=-1)
    whole = {"attention_mask": torch.ones_like(longer)}
    expected = drop(fused, longer, **whole), generate(fused, longer, use_cache=False, **whole)
    again = drop(fused, ids, return_dict_in_generate=True, past_key_values=DynamicCache())
    assert torch.equal(generate(fused, longer, past_key_values=again.past_key_values, **whole), expected[1])
    assert torch.equal(drop(fused, longer, past_key_values=first.past_key_values, **whole), expected[0])


# ---------------------------------------------------------------------------------------------- batches


def test_padding_on_the_left_changes_no_token():
    fused, ids = fuse(MIXES["one family"](), gate="cross"), prompt(batch=1, length=12)
    mask = torch.ones_like(ids)
    ids[:, :9] = mask[:, :9] = 0
    assert torch.equal(drop(fused, ids, every=8, attention_mask=mask)[:, 9:], drop(fused, ids[:, 9:], every=8))


def test_texts_share_those_that_any_of_them_keeps_and_have_weights_of_their_own(monkeypatch):
    monkeypatch.setitem(GATES, "parity", Parity)
    fused, ids = fuse(MIXES["one family"](), gate="parity"), prompt(batch=2)
    ids[0] -= ids[0] % 2
    ids[1] -= 1 - ids[1] % 2
    # each keeps one of the two, and listens to both
    counts = passes(fused, lambda: one_by_one(fused, ids, "top_k:1", 10**9))
    assert counts == {"text": STEPS, "code": STEPS, "math": 2}
    assert torch.equal(drop(fused, ids, "top_k:1", 10**9), generate(fused, ids))


def test_a_text_that_has_ended_keeps_nobody():
    asked = Asked(TextReader(fuse(MIXES["one family"]()), {}), sparsifier("top_k:1"), 4)
    asked.weights, asked.states = torch.eye(3)[:2, None], [torch.zeros(2, 1, 8)] * 3
    for live, kept in {(True, True): [True, True, False], (False, True): [False, True, False]}.items():
        asked._decide(torch.tensor(live))
        assert asked.kept.tolist() == kept


# ---------------------------------------------------------------------------------------------- a prior on the gate


@pytest.mark.parametrize("keep", ["top_k:1", "top_k:2"])
def test_a_prior_counts_where_it_is_decided_and_in_between(keep):
    fused, ids, prior = fuse(MIXES["one family"](), gate="constant"), prompt(batch=1), torch.tensor([[4.0, 1.0, 9.0]])
    given = drop(fused, ids, keep, gate_prior=prior)
    assert not torch.equal(given, drop(fused, ids, keep))
    # scores are divided by the temperature, a prior is not
    fused.model.fusion_gate.logits.data += fused.config.gate_temperature * prior[0].log()
    assert torch.equal(given, drop(fused, ids, keep))


def test_a_text_that_has_ended_has_weights_though_its_prior_wants_others():
    reader = TextReader(fuse(MIXES["one family"]()), {"gate_prior": torch.tensor([[1.0, 0, 0], [0, 3.0, 5.0]])})
    asked = Asked(reader, sparsifier("top_k:1"), 4)
    asked.kept = torch.tensor([False, True, False])
    assert asked._prior(2).tolist() == [[0, 1, 0], [0, 3, 0]]


# ---------------------------------------------------------------------------------------------- beside options


def test_processors_stop_strings_and_streamers_work():
    fused, tok = fuse(MIXES["one family"]()), tokenizer()
    ids = tok(["hello world"], return_tensors="pt").input_ids
    plain, heard = generate(fused, ids, repetition_penalty=3.0), Heard()
    assert torch.equal(drop(fused, ids, "none", repetition_penalty=3.0, streamer=heard), plain)
    assert (heard.tokens, heard.ends) == (plain[0].tolist(), 1)
    text = drop(fused, ids)
    stop = {"stop_strings": [tok.decode(text[0, ids.shape[1] + 4])], "tokenizer": tok}
    ended = drop(fused, ids, **stop)
    assert ended.shape[1] < text.shape[1]
    assert torch.equal(ended, text[:, : ended.shape[1]])


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "Dropping follows one continuation of a text, but got num_beams=2"),
        ({"every": 0}, "`every` is the number of tokens.*but it is 0"),
        ({"every": True}, "`every` is the number of tokens.*but it is True"),
        ({"keep": "top_q"}, "Unknown sparsifier 'top_q'"),
        ({"keep": "top_p:2"}, "top_p keeps .* But got '2'"),
        ({"cache_implementation": "static"}, "cache that can go back, but got a StaticCache"),
        ({"output_scores": True, "return_dict_in_generate": True}, "returns tokens, but got.*output_scores"),
        ({"prompt_lookup_num_tokens": 3}, "greedily or by sampling, but the settings say 'assisted_generation'"),
    ],
)
def test_what_cannot_be_dropped_is_refused_with_the_way_out(options, message):
    fused = fuse(MIXES["one family"]())
    with pytest.raises(ValueError, match=message):
        drop(fused, prompt(batch=1), **options)


def test_an_adapter_on_the_head_is_refused():
    tuned = get_peft_model(fuse(MIXES["one family"]()), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="Dropping takes the head one specialist at a time"):
        drop(tuned.base_model.model, prompt(batch=1))


def test_models_that_cannot_lag_behind_are_refused():
    with pytest.raises(ValueError, match="one by one, but this is a StackedForCausalLM"):
        drop(stack(fuse({n: specialist() for n in ("text", "code")})), prompt(batch=1))
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    types = ["linear_attention", "full_attention"]
    hybrid = specialist("qwen3_5_text", layer_types=types, linear_value_head_dim=8, **linear)
    with pytest.raises(ValueError, match="recurrent specialist cannot catch up"):
        drop(fuse({"text": specialist(), "code": hybrid}), prompt(batch=1))
