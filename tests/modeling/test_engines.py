"""An engine that is not known by name finds each layer by its number in the whole model, or is refused in words."""

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM
from tests.support.tiny import specialist, stir_gate


NEW = 8
PROMPT = [5, 17, 40, 8, 23, 61, 9]
WINDOW = 4


class Layer:
    """Keeps the keys and values of one layer of one text, and attends to them."""

    def __init__(self, window):
        self.window, self.keys, self.values = window, [], []

    def attend(self, query, key, value, scaling):
        self.keys.append(key)
        self.values.append(value)
        keys, values = (torch.cat(kept, 2) for kept in (self.keys, self.values))
        keys, values = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (keys, values))
        total, new = keys.shape[2], query.shape[2]
        behind = torch.arange(total - new, total)[:, None] - torch.arange(total)
        scores = (query @ keys.mT) * scaling
        shares = scores.masked_fill((behind < 0) | (behind >= self.window), float("-inf")).softmax(-1)
        return (shares @ values).transpose(1, 2)


def attend(module, query, key, value, attention_mask, scaling, attention_instances, **kwargs):
    return attention_instances[module.layer_idx].attend(query, key, value, scaling), None


def attend_as_sdpa(*args, **kwargs):
    return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "some_engine", attend)
    return "some_engine"


def fuse(**choices):
    parts = {"a": specialist(), "b": specialist("mistral", layers=3, sliding_window=WINDOW), "c": specialist(layers=1)}
    fused = UltraFuserForCausalLM.from_specialists(parts, **choices).eval()
    stir_gate(fused)
    return fused


def built_by(engine, fused):
    """Builds the backbone as engines do: from the configuration, in which they have written their name."""
    config = UltraFuserConfig.from_dict(fused.config.to_dict())
    config._attn_implementation = engine
    return AutoModel.from_config(config).eval()


def numbers(backbone):
    return [p.layer_idx for p in backbone.modules() if isinstance(getattr(p, "layer_idx", None), int)]


@torch.no_grad()
def served(backbone, head, prompt):
    """Greedy tokens of a backbone that is given its attention, and new tokens alone."""
    config = backbone.config
    layers = {
        i: Layer(config.sliding_window if kind == "sliding_attention" else 10**6)
        for i, kind in enumerate(config.layer_types)
    }
    tokens = list(prompt)
    for read in (0, *range(len(prompt), len(prompt) + NEW - 1)):
        ids, positions = torch.tensor([tokens[read:]]), torch.arange(read, len(tokens))[None]
        states = backbone(
            input_ids=ids, position_ids=positions, use_cache=False, return_dict=False, attention_instances=layers
        )[0]
        tokens.append(head(states[0, -1]).argmax().item())
    return tokens


@pytest.mark.parametrize("gate", ["mlp", "anchor:b"])
def test_layers_are_numbered_over_the_whole_model_and_tokens_are_those_of_generate(gate, engine):
    fused = fuse(gate=gate)
    backbone = built_by(engine, fused)
    backbone.load_state_dict(fused.model.state_dict())
    assert sorted(numbers(backbone)) == list(range(6)) == list(range(backbone.config.num_hidden_layers))
    expected = fused.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert served(backbone, fused.lm_head, PROMPT) == expected[0].tolist()


def test_attention_of_the_users_own_counts_each_specialists_layers_as_transformers_does(tmp_path, monkeypatch):
    fused = fuse()
    fused.save_pretrained(tmp_path)
    # as `AttentionInterface.register` and `AttentionMaskInterface.register` do, which never forget
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "my_attention", attend_as_sdpa)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "my_attention", sdpa_mask)
    own = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="my_attention")
    assert numbers(own) == [0, 1, 0, 1, 2, 0]
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    for model, wanted in ((own, fused), (own.specialist("b"), fused.specialist("b"))):
        ids = torch.tensor([PROMPT])
        assert torch.equal(model.generate(ids, **options), wanted.generate(ids, **options))


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ({"gate": "posterior"}, "keeps no state of a gate that reads the past, but it is {'a': 'posterior'"),
        ({"fusion": "probabilities"}, "computes logits with one linear head, which needs fusion='logits'"),
    ],
)
def test_what_an_engine_would_serve_wrongly_is_refused_with_its_name(engine, choices, reason):
    with pytest.raises(ValueError, match="The engine 'some_engine' .*Use transformers") as caught:
        built_by(engine, fuse(**choices))
    assert reason in str(caught.value)


def test_a_cache_of_transformers_is_refused_where_an_engine_keeps_keys_and_values(engine):
    backbone = built_by(engine, fuse())
    with pytest.raises(ValueError, match="'some_engine'.*a cache was asked for.*use_cache=False"):
        backbone(input_ids=torch.tensor([PROMPT]))


def test_one_embedding_in_place_of_all_is_refused(engine):
    backbone = built_by(engine, fuse())
    # SGLang's Transformers backend makes one of these numbers
    given = backbone.get_input_embeddings()
    with pytest.raises(ValueError, match="Each specialist has a token embedding of its own"):
        backbone.set_input_embeddings(nn.Embedding(given.num_embeddings, given.embedding_dim))
