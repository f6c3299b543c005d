"""Eight threads on one model say what one says: whoever speaks, steers, drafts or explains."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.tiny import specialist, stir_gate
from tests.support.ways import NAMES, ROUNDS, THREADS, WAYS, prompt, spoken, tokens
from ultrafuser.decoding.stacking import stack
from ultrafuser.serve.chat import followed


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = UltraFuserForCausalLM.from_specialists({name: specialist(layers=2) for name in NAMES})
    stir_gate(model)
    model.generation_config.suppress_tokens = [0, 1, 2]
    return model


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


@pytest.mark.e2e
@pytest.mark.grid
@pytest.mark.parametrize("way", WAYS)
def test_eight_threads_on_one_model_say_what_one_says(way, model):
    assert in_threads(lambda number: WAYS[way](model, number)) == alone(lambda number: WAYS[way](model, number))


@pytest.mark.e2e
def test_eight_threads_on_one_stacked_model_say_what_one_says(model):
    stacked = stack(model)
    assert in_threads(lambda n: tokens(stacked, n)) == alone(lambda n: tokens(model, n))
    assert in_threads(lambda n: spoken(stacked, n)[0]) == alone(lambda n: spoken(model, n)[0])


@pytest.mark.e2e
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
