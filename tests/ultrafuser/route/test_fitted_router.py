"""The fitted router: the fused model's loss on a prompt, its slope, and what steps down it do."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.gates_ultrafuser import GATES
from modeling_ultrafuser.refusals_ultrafuser import Refusal
from tests.support.adapted import make
from tests.support.tiny import specialist, stir_gate, tokenizer
from ultrafuser.route.prompt_reading import Prompts, left_padded
from ultrafuser.route.prompt_route import PromptRoute
from ultrafuser.route.router_files import load_router


NAMES = ["text", "code", "math"]
PROMPTS = 20


def prompts_of(model):
    """Twenty random prompts, of 2 to 21 tokens."""
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 99, (length,), generator=rng) for length in range(2, 2 + PROMPTS)]
    return Prompts(model, tokenizer(), *left_padded(rows))


def fuse(gate="mlp", fusion="logits", **options):
    torch.manual_seed(0)
    models = {name: specialist(layers=1) for name in NAMES}
    model = UltraFuserForCausalLM.from_specialists(models, gate=gate, fusion=fusion, **options)
    stir_gate(model)
    return model.eval()


def loss_by_the_model(model, prompts, prior):
    """Each prompt by itself, through the whole model. Shape (prompts,)."""
    found = []
    for ids, mask, own in zip(prompts.input_ids, prompts.attention_mask, prior, strict=True):
        ids = ids[mask.bool()][None]
        logits = model(ids, gate_prior=own[None]).logits[0, :-1]
        found.append(F.cross_entropy(logits, ids[0, 1:]))
    return torch.stack(found)


def prior_of(word, model, prompts=None):
    return load_router(word, NAMES).prior(prompts or prompts_of(model))


@pytest.mark.grid
@pytest.mark.parametrize("fusion", ["logits", "probabilities"])
@pytest.mark.parametrize("gate", GATES)
def test_losses_and_their_slope_are_the_whole_model_s_and_specialists_run_once(gate, fusion):
    model = fuse(gate, fusion)
    prompts, runs = prompts_of(model), []
    scores = torch.randn(PROMPTS, 3, requires_grad=True)
    expected = loss_by_the_model(model, prompts, scores.softmax(-1))
    expected.sum().backward()
    slope, scores.grad = scores.grad, None
    model.model.specialists["text"].register_forward_hook(lambda *_: runs.append(1))
    found = prompts.fused_losses(scores.softmax(-1))
    found.sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores.grad, slope, rtol=1e-3, atol=1e-4)
    prior_of("fitted:2", model, prompts)
    assert runs == [1]


def test_without_steps_nothing_changes():
    model = fuse()
    prompts = prompts_of(model)
    prior = prior_of("fitted:0", model, prompts)
    assert torch.equal(prior, torch.full((PROMPTS, 3), 1 / 3))
    ids = prompts.input_ids[-1:]
    torch.testing.assert_close(model(ids, gate_prior=prior[:1]).logits, model(ids).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fusion", ["logits", "probabilities"])
def test_small_steps_raise_no_prompt_s_loss_and_lower_the_mean_each_time(fusion):
    model = fuse("cross", fusion)
    prompts, losses = prompts_of(model), []
    for steps in range(4):
        losses.append(loss_by_the_model(model, prompts, prior_of(f"fitted:{steps},0.1", model, prompts)).detach())
    for before, after in zip(losses, losses[1:], strict=False):
        assert (after <= before + 1e-6).all()
        assert after.mean() < before.mean() - 1e-5


def test_steps_that_are_far_too_large_raise_no_loss():
    model = fuse()
    prompts = prompts_of(model)
    before, after = (
        loss_by_the_model(model, prompts, prior_of(w, model, prompts)) for w in ("fitted:0", "fitted:2,900")
    )
    assert (after <= before + 1e-5).all()


def test_a_step_is_the_slope_times_the_rate():
    model = fuse()
    prompts = prompts_of(model)
    scores = torch.zeros(PROMPTS, 3, requires_grad=True)
    loss_by_the_model(model, prompts, scores.softmax(-1)).sum().backward()
    torch.testing.assert_close(
        prior_of("fitted:1,0.1", model, prompts), (-0.1 * scores.grad).softmax(-1), rtol=1e-4, atol=1e-5
    )


def test_what_one_specialist_predicts_goes_to_it_and_a_single_token_to_none():
    model = fuse("uniform")
    with torch.no_grad():
        for name in ("text", "math"):
            # heads that say nothing
            model.lm_head.weight[:, model.head_columns()[NAMES.index(name)]] = 0
        ids = model.specialist("code").generate(
            torch.tensor([[7, 8]]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert prior_of("fitted:5", model, Prompts(model, tokenizer(), ids)).argmax().item() == 1
    assert torch.equal(prior_of("fitted:5", model, Prompts(model, tokenizer(), ids[:, :1])), torch.full((1, 3), 1 / 3))


def test_an_answer_in_inference_mode_goes_on_from_what_it_has_read():
    model, options = (
        fuse("evidence"),
        {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0},
    )
    with torch.inference_mode():
        ids = torch.arange(5, 15)[None]
        routed = PromptRoute(model, tokenizer(), "fitted:3")(ids)
        expected = model.generate(ids, gate_prior=routed.prior, **options)
        assert torch.equal(model.generate(ids, **routed.options, **options), expected)
    assert not torch.equal(routed.prior, torch.full((1, 3), 1 / 3))


def test_adapters_of_one_base_are_weighed_too(tmp_path):
    model = UltraFuserForCausalLM.from_specialists(make(tmp_path), gate="mlp").eval()
    prompts = prompts_of(model)
    router = load_router("fitted:3", model.config.specialist_names)
    before, after = (loss_by_the_model(model, prompts, p) for p in (torch.ones(PROMPTS, 3), router.prior(prompts)))
    assert (after <= before + 1e-6).all()
    assert after.mean() < before.mean()


@pytest.mark.parametrize("word", ["fitted:-1", "fitted:two", "fitted:2,0", "fitted:2,nan", "fitted:1,2,3"])
def test_a_setting_that_is_none_is_refused(word):
    with pytest.raises(
        ValueError, match="their number, from 0 on, and the rate, above 0.*'fitted:3,1' is the default"
    ):
        load_router(word, NAMES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "contrast"}, "This rule is for decoding: the loss of a text would be infinite"),
        (
            {"gate": "uniform", "signed_weights": [1, 1, -1]},
            "weights are signed. It weighs shares .* such as 'perplexity'",
        ),
    ],
)
def test_a_model_whose_loss_says_nothing_is_refused_before_a_prompt(options, message):
    with pytest.raises(Refusal, match=message):
        PromptRoute(fuse(**options), tokenizer(), "fitted", alone=True)
