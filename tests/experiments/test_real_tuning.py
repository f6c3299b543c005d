import argparse
from random import Random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.real import tuning
from experiments.real.dataset import row, write
from experiments.real.packing import IGNORED, Example, collate, rows_of
from experiments.real.tuning import loss_of, schedule, tune
from tests.support import adapted


START, LENGTH, PAD = [1, 5, 6], 24, 2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, **sizes)).eval()


def examples(count):
    random = Random(0)
    ids = [[random.randrange(7, 40) for _ in range(random.randint(4, 9))] for _ in range(count)]
    return [Example(i, [IGNORED, IGNORED, *i[2:]]) for i in ids]


def test_a_packed_conversation_is_read_as_if_it_stood_alone(model):
    row = examples(3)
    batch = collate([row], START, LENGTH + 12, PAD)
    with torch.no_grad():
        packed = model(input_ids=batch.input_ids, attention_mask=batch.mask, position_ids=batch.position_ids).logits[0]
        place = len(START)
        for example in row:
            alone = model(input_ids=torch.tensor([START + example.ids])).logits[0, len(START) :]
            torch.testing.assert_close(packed[place : place + len(example.ids)], alone, atol=1e-5, rtol=1e-4)
            place += len(example.ids)


def test_the_loss_is_the_mean_over_the_learned_tokens_of_all_conversations(model):
    rows = rows_of(examples(6), LENGTH - len(START), Random(0))
    wrapped = SimpleNamespace(base_model=SimpleNamespace(model=model))
    total = count = 0
    with torch.no_grad():
        for example in examples(6):
            labels = torch.tensor([[IGNORED] * len(START) + example.labels])
            learned = sum(label != IGNORED for label in example.labels)
            total += learned * model(input_ids=torch.tensor([START + example.ids]), labels=labels).loss.item()
            count += learned
        loss = loss_of(wrapped, collate(rows, START, LENGTH, PAD)).item()
    assert loss == pytest.approx(total / count, rel=1e-4)


def test_every_example_is_in_one_row_and_no_row_is_too_long():
    all_examples = examples(50)
    rows = rows_of(all_examples, 20, Random(1))
    assert sorted(e.ids for row in rows for e in row) == sorted(e.ids for e in all_examples)
    assert max(sum(len(e.ids) for e in row) for row in rows) <= 20


def test_the_rate_rises_stays_and_falls():
    rates = [schedule(step, 1000) for step in range(1001)]
    assert rates[0] < rates[10] < rates[20] == rates[600] == 1.0 > rates[800] > rates[950] > rates[1000] == 0.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, adapters of it, and conversations."""
    folder = tmp_path_factory.mktemp("tuning")
    adapted.make(folder)
    write(folder / "data.jsonl", [row("sum", f"{i}+{i}?", f"Answer: {2 * i}") for i in range(30)])
    return folder


def tuned(folder, out, start=None):
    """The weights of an adapter that is tuned for some steps."""
    settings = {"steps": 5, "rank": 2, "rate": 1e-2, "length": 96, "rows": 2, "seed": 0, "save_every": 2}
    paths = {"base": str(folder / "base"), "data": [str(folder / "data.jsonl")], "out": out, "start": start}
    tune(argparse.Namespace(**paths, **settings, compile=False, device="cpu"))
    return load_file(out / "adapter_model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.e2e
@pytest.mark.parametrize("step", [1, 3, 5])
def test_tuning_that_is_killed_ends_with_the_same_adapter(folder, tmp_path, monkeypatch, step):
    whole = tuned(folder, tmp_path / "whole")
    at, calls = tuning.Batches.at, []

    def killed(self, number):
        calls.append(number)
        if len(calls) == step:
            raise KeyboardInterrupt
        return at(self, number)

    monkeypatch.setattr(tuning.Batches, "at", killed)
    with pytest.raises(KeyboardInterrupt):
        tuned(folder, tmp_path / "killed")
    assert equal(tuned(folder, tmp_path / "killed"), whole)
    # what was kept is not trained again
    assert calls[step:] == list(range((step - 1) // 2 * 2, 5))


@pytest.mark.e2e
def test_tuning_goes_on_from_an_adapter(folder, tmp_path):
    start = load_file(folder / "math" / "adapter_model.safetensors")
    found = tuned(folder, tmp_path / "further", start=str(folder / "math"))
    assert found.keys() == start.keys()
    moved = [(found[name].float() - start[name]).abs().max().item() for name in start]
    assert 0 < max(moved) < 0.1
