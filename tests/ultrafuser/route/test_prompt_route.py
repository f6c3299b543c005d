"""Routed requests: a prior on the gate, or one specialist, with the tokens that each gives by itself."""

import pytest
import torch

from modeling_ultrafuser.compat_ultrafuser import CACHE
from tests.support.adapted import make, pair
from tests.support.mixes import MIXES, fuse
from tests.support.tiny import specialist, tokenizer
from ultrafuser.decoding.drafting import self_draft
from ultrafuser.route.prompt_reading import left_padded
from ultrafuser.route.prompt_route import PromptRoute
from ultrafuser.route.router_base import Router


LENGTH = {"max_new_tokens": 8, "do_sample": False}


class Fixed(Router):
    """Always says the same, of each prompt of a batch."""

    def __init__(self, *weights):
        super().__init__({})
        self.weights = torch.tensor(weights)

    def prior(self, prompts):
        return self.weights


def inputs(*lines):
    ids, mask = left_padded([torch.tensor(tokenizer()(line)["input_ids"]) for line in lines])
    return {"input_ids": ids, "attention_mask": mask}


def answer(routed, given, **options):
    return routed.model.generate(**given, **routed.options, **LENGTH, **options)


@pytest.fixture
def model():
    return fuse({"text": specialist(layers=1), "code": specialist(layers=2)})


@pytest.mark.parametrize("gate", ["mlp", "evidence"])
@pytest.mark.parametrize("lines", [["what is 2+2?"], ["what is 2+2?", "def f(x): return"]])
def test_an_answer_goes_on_from_what_the_router_has_read(lines, gate):
    model, given = fuse(MIXES["windows"](), gate=gate), inputs(*lines)
    routed = PromptRoute(model, tokenizer(), "perplexity:0.3")(**given)
    assert CACHE in routed.options
    expected = model.generate(**given, gate_prior=routed.prior, **LENGTH)
    reads = []
    model.model.specialists.text.register_forward_pre_hook(
        lambda _, args, kwargs: reads.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assert torch.equal(answer(routed, given), expected)
    assert set(reads) == {1}


def test_self_drafting_goes_on_from_it_too(model):
    given = inputs("what is 2+2?")
    expected = answer(PromptRoute(model, tokenizer(), "perplexity")(**given), given)
    routed = PromptRoute(model, tokenizer(), "perplexity")(**given)
    assert torch.equal(answer(routed, given, custom_generate=self_draft), expected)


@pytest.mark.parametrize("line", ["2", "what is 2+2?"])
def test_alone_is_the_specialist_with_the_largest_weight_and_runs_no_other(line, model):
    given = inputs(line)
    expected = model.specialist("code").generate(**given, **LENGTH)
    runs = []
    for name, own in model.model.specialists.items():
        own.register_forward_hook(lambda *_, name=name: runs.append(name))
    routed = PromptRoute(model, tokenizer(), Fixed([0.4, 0.6]), alone=True)(**given)
    assert torch.equal(routed.prior, torch.tensor([[0.0, 1.0]]))
    assert torch.equal(answer(routed, given), expected)
    assert set(runs) == {"code"}


def test_prompts_of_one_batch_have_a_specialist_each(model):
    given = inputs("what is 2+2?", "def f(x): return")
    routed = PromptRoute(model, tokenizer(), Fixed([0.4, 0.6], [0.7, 0.3]), alone=True)(**given)
    expected = [model.specialist(name).generate(**given, **LENGTH) for name in ("code", "text")]
    assert torch.equal(answer(routed, given), torch.stack([expected[0][0], expected[1][1]]))


def test_of_adapters_of_one_base_one_answers_alone_too(tmp_path):
    (model, _), given = pair(make(tmp_path), gate="mlp"), inputs("what is 2+2?")
    routed = PromptRoute(model, tokenizer(), Fixed([0.1, 0.1, 0.8]), alone=True)(**given)
    assert routed.model is model
    assert torch.equal(answer(routed, given), model.specialist("math").generate(**given, **LENGTH))


def test_a_prior_of_the_request_comes_before_the_routers(model):
    given, own = inputs("what is 2+2?"), torch.tensor([[1.0, 0.0]])
    for route in (PromptRoute(model, tokenizer()), PromptRoute(model, tokenizer(), Fixed([0.0, 1.0]))):
        routed = route(**given, prior=own)
        assert torch.equal(answer(routed, given), model.specialist("text").generate(**given, **LENGTH))
    plain = PromptRoute(model, tokenizer())(**given)
    assert plain == (model, {}, None)


def test_a_cache_of_its_own_kind_reads_the_prompt_anew(model):
    given = inputs("what is 2+2?")
    expected = answer(PromptRoute(model, tokenizer(), "perplexity")(**given), given)
    model.generation_config.cache_implementation = "static"
    assert torch.equal(answer(PromptRoute(model, tokenizer(), "perplexity")(**given), given), expected)


def test_alone_without_a_router_is_refused(model):
    with pytest.raises(ValueError, match="One specialist answers alone if a router chooses it.*Name a router"):
        PromptRoute(model, tokenizer(), alone=True)
