"""Evidence that attention carries from token to token, in an engine that keeps keys and values and nothing else."""

import copy

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.carrying_ultrafuser import WINDOW, Carrier, carried_on, joined, pieces
from modeling_ultrafuser.forecasts_ultrafuser import accumulated
from modeling_ultrafuser.gate_base_ultrafuser import Evidence
from modeling_ultrafuser.modeling_ultrafuser import UltraFuserModel
from tests.support.tiny import VOCAB, specialist


WANTED = Evidence(decays=(0.5, 0.99), switches=(0.2, 0.002, 0.0))
# (text, position of its first token, how many) of each pass
PASSES = [
    [("a", 0, 5), ("b", 0, 7)],
    [("a", 5, 1), ("b", 7, 4)],
    [("b", 11, 1), ("a", 6, 6)],
    [("a", 12, 1), ("b", 12, 1)],
    # a draft was rejected, and another text has the beginning of this one
    [("b", 10, 3), ("a", 13, 1)],
]


class Engine:
    """Keeps keys and values by text and layer, and attends to those in the layer's window."""

    def __init__(self, config):
        self.config, self.kept, self.batch = config, {}, []
        # text to the one whose beginning lies in the cache once for both, and how long that is
        self.shared = {}

    def attend(self, module, query, key, value, mask, scaling, **kwargs):
        slides = self.config.layer_types[module.layer_idx] == "sliding_attention"
        window = self.config.sliding_window if slides else query.shape[2] + 1000
        found = []
        for part, (text, first, number) in zip(self.parts(query), self.batch, strict=True):
            before = self.kept.get((module.layer_idx, text), (key[0, :, :0], value[0, :, :0]))
            if text in self.shared:
                begun, length = self.shared[text]
                theirs = self.kept[module.layer_idx, begun]
                before = [torch.cat([t[:, :length], b[:, length:]], 1) for t, b in zip(theirs, before, strict=True)]
            keys, values = (
                torch.cat([b[:, :first], t[0, :, part]], 1) for b, t in zip(before, (key, value), strict=True)
            )
            self.kept[module.layer_idx, text] = keys, values
            keys, values = (t.repeat_interleave(query.shape[1] // len(t), 0) for t in (keys, values))
            behind = torch.arange(first, first + number)[:, None] - torch.arange(first + number)
            scores = (query[0, :, part].float() @ keys.float().mT) * scaling
            shares = scores.masked_fill((behind < 0) | (behind >= window), float("-inf")).softmax(-1)
            found.append((shares.to(values.dtype) @ values).transpose(0, 1).flatten(1))
        return torch.cat(found), None

    def parts(self, query):
        lengths = [number for _, _, number in self.batch]
        assert sum(lengths) == query.shape[2]
        start = 0
        for length in lengths:
            yield slice(start, start + length)
            start += length


class Served(nn.Module):
    """What vLLM puts around a backbone."""

    def __init__(self, model, head):
        super().__init__()
        self.model = model
        self.lm_head = head


@pytest.fixture
def fused(request):
    specialists = {
        "a": specialist(),
        "b": specialist(layers=3),
        "c": specialist("mistral", layers=1, sliding_window=None),
    }
    fused = UltraFuserForCausalLM.from_specialists(specialists, gate=getattr(request, "param", "evidence")).eval()
    for parameter in fused.model.fusion_gate.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return fused


@pytest.fixture
def engine(fused, monkeypatch):
    config = copy.deepcopy(fused.config)
    engine = Engine(config)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", engine.attend)
    config._attn_implementation = "vllm"
    return engine


def served(engine, fused):
    """The fused model's backbone in the engine."""
    backbone = UltraFuserModel(engine.config).eval()
    backbone.load_state_dict(fused.model.state_dict())
    Served(backbone, fused.lm_head)
    return backbone


def check_passes(fused, backbone, engine, texts, passes):
    """Each pass reads a part of some texts: (text, first token, tokens)."""
    expected = {name: fused(ids).gate_weights[0] for name, ids in texts.items()}
    for batch in passes:
        engine.batch = batch
        ids = torch.cat([texts[t][:, first : first + n] for t, first, n in batch], 1)
        positions = torch.cat([torch.arange(first, first + n) for _, first, n in batch])[None]
        found = backbone(input_ids=ids, position_ids=positions, use_cache=False, return_dict=True).gate_weights[0]
        wanted = torch.cat([expected[t][first : first + n] for t, first, n in batch])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", ["evidence", "posterior"], indirect=True)
@torch.no_grad()
def test_weights_are_those_of_the_ordinary_model_however_texts_are_cut_and_mixed(fused, engine):
    backbone = served(engine, fused)
    texts = {name: torch.randint(3, VOCAB, (1, 14)) for name in "ab"}
    check_passes(fused, backbone, engine, texts, PASSES)


@pytest.mark.parametrize("fused", ["evidence", "posterior"], indirect=True)
@torch.no_grad()
def test_weights_are_right_where_two_texts_with_one_beginning_start_in_one_pass(fused, engine):
    backbone = served(engine, fused)
    texts = {name: torch.randint(3, VOCAB, (1, 14)) for name in "ab"}
    texts["b"][:, :8] = texts["a"][:, :8]
    engine.shared = {"b": ("a", 8)}
    check_passes(fused, backbone, engine, texts, ([("a", 0, 12), ("b", 8, 4)], [("b", 12, 2), ("a", 12, 2)]))


@torch.no_grad()
def test_weights_of_a_token_follow_from_what_was_read_in_earlier_passes(fused, engine):
    backbone = served(engine, fused)
    found = []
    for changed in (False, True):
        ids = torch.arange(5, 15)[None]
        if changed:
            ids[0, 3] = 50
        # the hidden states of the last token must not tell
        for batch in ([("a", 0, 9)], [("a", 9, 1)]):
            engine.batch = batch
            _, first, n = batch[0]
            inputs = {"input_ids": ids[:, first : first + n], "position_ids": torch.arange(first, first + n)[None]}
            backbone(**inputs, use_cache=False)
        found.append(engine.kept[backbone.reader.first_layers[-1], "a"][1])
    assert not torch.equal(found[0][:, 9], found[1][:, 9])
    assert torch.equal(found[0][:, :3], found[1][:, :3])


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_token_leaves_arrives_bit_by_bit(dtype, engine):
    carrier, start = Carrier(engine.config, WANTED), 2**20 - 3
    engine.config.sliding_window = 200
    left = torch.randn(1000, carrier.known + sum(carrier.widths)).to(dtype)
    engine.batch = [("a", 0, 1000)]
    found = carrier._previous(left, start + torch.arange(1000))
    assert torch.equal(found[1:], left[:-1])
    # beside the first there is nothing else to read
    assert torch.equal(found[0], left[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_survive_in_fewer_bits(dtype):
    numbers = torch.randn(100, 7) * torch.tensor([1e-4, 1e-2, 1, 1e2, 1e3, 1e4, 1e5])
    assert torch.equal(joined(torch.cat(pieces(numbers, dtype), -1)), numbers)
    halves = joined(torch.cat(pieces(-numbers.abs(), torch.float16), -1))
    torch.testing.assert_close(halves, -numbers.abs().clamp(max=65504.0), rtol=1e-6, atol=1e-7)


def test_side_by_side_or_one_after_another_evidence_is_the_same():
    lengths = (1, 7, 300)
    log_probs = -8 * torch.rand(sum(lengths), 3)
    wanted, first = [], torch.zeros(sum(lengths), dtype=torch.bool)
    for part in log_probs.split(lengths):
        follows = torch.ones(1, len(part), dtype=torch.bool)
        follows[0, 0], first[sum(map(len, wanted))] = False, True
        wanted.append(accumulated(part[None], follows, follows, WANTED)[0])
    wanted, nothing = torch.cat(wanted), torch.full((sum(lengths), 3, 5), 3.0)
    follows = torch.arange(len(wanted)).float() * ~first
    torch.testing.assert_close(carried_on(log_probs, follows, first, nothing, *WANTED), wanted, rtol=1e-5, atol=1e-3)
    # from the middle on
    begins = torch.zeros_like(first)
    begins[5] = begins[150] = True
    before = torch.where(begins[:, None, None], wanted.roll(1, 0), nothing)
    follows = torch.arange(len(wanted) - 5).float() * ~(begins | first)[5:]
    found = carried_on(log_probs[5:], follows, first[5:], before[5:], *WANTED)
    torch.testing.assert_close(found, wanted[5:], rtol=1e-5, atol=1e-3)


def test_the_configuration_is_told_of_the_layers_once(fused, engine):
    layers = fused.config.num_hidden_layers
    models = [UltraFuserModel(engine.config) for _ in range(2)]
    room = 2 * 8
    extra = -(-(3 * (1 + 3 * 9) + 3 * 32) // room)
    assert [len(m.carrier.layers) for m in models] == [extra, extra]
    assert engine.config.num_hidden_layers == layers + extra == len(engine.config.layer_types)
    assert engine.config.layer_types[layers:] == ["sliding_attention"] * extra
    assert engine.config.sliding_window == WINDOW
    assert [layer.layer_idx for layer in models[1].carrier.layers] == list(range(layers, layers + extra))
    assert fused.model.carrier is None
    assert set(models[0].state_dict()) == set(fused.model.state_dict())


def test_a_window_of_more_tokens_than_digits_tell_apart_is_refused_in_words(engine):
    engine.config.sliding_window = 257
    with pytest.raises(ValueError, match="8 digits tell 256 positions apart, but the specialists' window is 257"):
        Carrier(engine.config, WANTED)


def test_a_head_in_parts_and_a_cache_that_rounds_are_refused_in_words(fused, engine):
    backbone = UltraFuserModel(engine.config)
    with pytest.raises(ValueError, match=r"takes the whole head in plain weights, but vLLM has 50 of its rows here"):
        Served(backbone, nn.Linear(fused.config.hidden_size, 50, bias=False))
    backbone = UltraFuserModel(engine.config)
    backbone.carrier.layers[1].attn = nn.Module()
    backbone.carrier.layers[1].attn.kv_cache_torch_dtype = torch.uint8
    with pytest.raises(ValueError, match=r"in torch.float32, but it is in .*uint8.* --kv-cache-dtype auto"):
        Served(backbone, fused.lm_head)
    # found once, and never looked for again
    backbone = UltraFuserModel(engine.config)
    Served(backbone, fused.lm_head)
    assert backbone.wide_head == (fused.lm_head,)
    Served(backbone, nn.Linear(3, 3))
    assert backbone.wide_head == (fused.lm_head,)
