"""Eight threads on one model say what one says: whoever speaks, steers, drafts or explains."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.conftest import stir_gate
from tests.tiny import specialist, tokenizer
from ultrafuser.decoding.choosing import decoder
from ultrafuser.decoding.drafting import self_draft
from ultrafuser.decoding.stacking import stack
from ultrafuser.reports.explanation import explain
from ultrafuser.serve.chat import Speech, followed, speak


THREADS, ROUNDS, TOKENS = 8, 1, 8
NAMES = ("text", "code", "math")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = UltraFuserForCausalLM.from_specialists({name: specialist(layers=2) for name in NAMES})
    stir_gate(model)
    model.generation_config.suppress_tokens = [0, 1, 2]
    return model


def prompt(number):
    return tokenizer()(f"{number} and {number}", return_tensors="pt")["input_ids"]


def tokens(model, number, **options):
    ids = prompt(number)
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, **settings, **options).tolist()


def spoken(model, number):
    speech = Speech(tokenizer(), lambda *_: None)
    speak(model, prompt(number), speech, TOKENS)
    return speech.text, torch.stack(speech.weights).tolist()


def steered(model, number):
    """Every second one is steered, each otherwise."""
    demo = pytest.importorskip("ultrafuser.serve.demo", exc_type=ImportError)
    if number % 2:
        return spoken(model, number)
    with demo.steered(model.model.fusion_gate, 2.0, [float(number), 0.0, 0.0]):
        return spoken(model, number), model.gate_weights(prompt(number)).tolist()


def explained(model, number):
    return [str(token) for token in explain(model, tokenizer(), f"{number} and {number}", generate=4)]


def drafted_by_a_specialist(model, number):
    return tokens(model, number, assistant_model=model.specialist("text"))


def decoded_as_chosen(model, number):
    able, options = decoder(model, ("plain", "stacked", "self-drafting", "prompt lookup")[number % 4])
    return tokens(able, number, **options)


WAYS = {
    "plain": tokens,
    "spoken": spoken,
    "steered": steered,
    "explained": explained,
    "gate weights": lambda model, number: model.gate_weights(prompt(number)).tolist(),
    "self-drafted": lambda model, number: tokens(model, number, custom_generate=self_draft),
    "drafted by a specialist": drafted_by_a_specialist,
    "static cache": lambda model, number: tokens(model, number, cache_implementation="static"),
    "beams": lambda model, number: tokens(model, number, num_beams=3),
    "decoder": decoded_as_chosen,
}


def in_threads(function):
    """What a function of a number gives, in threads that change often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-3)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(function, range(THREADS * ROUNDS)))
    finally:
        sys.setswitchinterval(interval)


def alone(function):
    return [function(number) for number in range(THREADS * ROUNDS)]


@pytest.mark.parametrize("way", WAYS)
def test_eight_threads_on_one_model_say_what_one_says(way, model):
    assert in_threads(lambda number: WAYS[way](model, number)) == alone(lambda number: WAYS[way](model, number))


def test_eight_threads_on_one_stacked_model_say_what_one_says(model):
    stacked = stack(model)
    assert in_threads(lambda n: tokens(stacked, n)) == alone(lambda n: tokens(model, n))
    assert in_threads(lambda n: spoken(stacked, n)[0]) == alone(lambda n: spoken(model, n)[0])


def test_eight_threads_that_go_all_ways_at_once_say_what_one_says(model):
    ways = list(WAYS.values())

    def any_way(number):
        return ways[number % len(ways)](model, number)

    assert in_threads(any_way) == alone(any_way)


def test_a_gate_is_followed_in_the_thread_that_follows_it_alone_and_no_longer(model):
    seen = []
    with followed(model.model.fusion_gate, lambda *_: seen.append(threading.get_ident())):
        for _ in range(2):
            other = threading.Thread(target=model.gate_weights, args=(prompt(1),))
            other.start()
            other.join()
        model.gate_weights(prompt(1))
    model.gate_weights(prompt(1))
    assert seen == [threading.get_ident()]


def test_what_is_followed_within_another_is_told_to_both(model):
    seen = []
    gate = model.model.fusion_gate
    with followed(gate, lambda *_: seen.append("outer")), followed(gate, lambda *_: seen.append("inner")):
        model.gate_weights(prompt(1))
    assert seen == ["outer", "inner"]
    assert not gate._forward_hooks
