"""Ways to use one model that several threads may take at once."""

import pytest
import torch

from tests.support.tiny import tokenizer
from ultrafuser.decoding.choosing import decoder
from ultrafuser.decoding.drafting import self_draft
from ultrafuser.reports.explanation import explain
from ultrafuser.serve.chat import Speech, speak


THREADS, ROUNDS, TOKENS = 8, 1, 8


NAMES = ("text", "code", "math")


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
