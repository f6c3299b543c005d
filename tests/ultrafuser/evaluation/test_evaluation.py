"""What is measured on held-out text, how sure it is, and that a comparison is made once."""

import pytest
import torch

from tests.support.conversations import CHAT_TEMPLATE
from tests.support.tiny import VOCAB, specialist, tokenizer
from ultrafuser.evaluation import measurement
from ultrafuser.evaluation.measurement import HeldOut, cost, held_out, score
from ultrafuser.evaluation.resampling import per_example
from ultrafuser.row_files import parse


LINES = ["what is 2+2? it is 4", "def read(self): return 1", "the value of the expression", "x = 3 * y + 4"]


@pytest.fixture
def data():
    rows = [{"text": line} for line in LINES]
    return held_out(rows, tokenizer(), prompt_tokens=5)


# --- measuring -------------------------------------------------------------------------------------------------------


def test_only_tokens_behind_the_prompt_are_scored(data):
    for row, line in enumerate(LINES):
        assert data.attention_mask[row].sum() == len(line)
        assert data.scored[row].nonzero().flatten().tolist() == list(range(5, len(line)))
        assert data.prompt[row].nonzero().flatten().tolist() == list(range(5))


def test_of_a_conversation_the_last_response_and_its_end_are_scored():
    tok = tokenizer(chat_template=CHAT_TEMPLATE)
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    data = held_out([{"messages": messages}], tok)
    assert tok.decode(data.input_ids[0][data.scored[0]]) == "4</s>"


def test_a_batch_scores_as_single_examples_do(fused, data):
    together = score(fused, data)
    for row in range(len(data)):
        length = data.attention_mask[row].sum()
        ids = data.input_ids[row : row + 1, :length]
        alone = HeldOut(ids, torch.ones_like(ids), data.scored[row : row + 1, :length])
        torch.testing.assert_close(score(fused, alone).losses[0], together.losses[row, :length], rtol=1e-4, atol=1e-5)


def test_a_batch_holds_no_more_logits_than_allowed(fused, data, monkeypatch):
    whole = score(fused, data)
    monkeypatch.setattr(measurement, "LOGITS", 2 * data.input_ids.shape[1] * VOCAB)
    batches = []
    by_two = score(fused, data, before=batches.append)
    assert [(rows.start, rows.stop) for rows in batches] == [(0, 2), (2, 4)]
    torch.testing.assert_close(by_two.losses[data.scored], whole.losses[data.scored], rtol=1e-4, atol=1e-5)


def test_mean_loss_is_the_models_own(fused, data):
    row = data[:1]
    length = row.attention_mask.sum()
    labels = row.input_ids.where(row.scored, -100)[:, :length]
    own = fused(input_ids=row.input_ids[:, :length], labels=labels).loss
    sums, counts = per_example(score(fused, row), row)
    assert sums[0] / counts[0] == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prose": "hello"}, "row 2 has {'prose': 'str'}"),
        ({"text": None}, "row 2 has"),
        ({"messages": [{"role": "user", "content": "2+2?"}]}, "row 2"),
    ],
)
def test_a_malformed_row_is_named(row, said):
    with pytest.raises(ValueError, match="eld-out row") as error:
        held_out([{"text": LINES[0]}, row], tokenizer(chat_template=CHAT_TEMPLATE), prompt_tokens=5)
    assert said in str(error.value)


def test_rows_too_short_to_be_scored_are_counted_and_left_out():
    data = held_out([{"text": LINES[0]}, {"text": "hi"}, {"text": LINES[1]}], tokenizer(), prompt_tokens=5)
    assert (len(data), data.skipped) == (2, 1)
    with pytest.raises(ValueError, match="none of the 1 rows has any"):
        held_out([{"text": "hi"}], tokenizer(), prompt_tokens=5)


def test_a_line_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"\n')
    with pytest.raises(ValueError, match=r"text\.jsonl, line 2: this row of domain 'text' is no JSON"):
        list(parse(str(path), "domain 'text'"))


def test_cost_counts_what_is_held_and_what_is_read(fused, specialists):
    price = cost(fused, specialists["text"], torch.arange(4)[None], new_tokens=2, repeats=1)
    total = sum(p.numel() for p in fused.parameters())
    tables_ = sum(m.get_input_embeddings().weight.numel() for m in fused.model.specialists.values())
    assert price["parameters"] == total
    assert price["parameters_per_token"] == total - tables_
    assert price["bytes"] == 4 * total
    # keys and values of 2 key-value heads in 2, 3 and 4 layers, 8, 8 and 12 wide, 4 bytes each
    assert price["cache_bytes_per_token"] == 2 * 4 * 2 * (2 * 8 + 3 * 8 + 4 * 12)
    assert price["tokens_per_second"] > 0


def test_a_tied_head_is_read_for_every_token():
    model = specialist("llama", tied=True)
    price = cost(model, model, torch.arange(4)[None], new_tokens=2, repeats=1)
    assert price["parameters_per_token"] == price["parameters"]


def test_layers_without_keys_have_no_part_in_what_a_token_adds_to_the_cache():
    mixer = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
    model = specialist("bamba", layers=3, attn_layer_indices=[1], **mixer)
    price = cost(model, model, torch.arange(4)[None], new_tokens=2, repeats=1)
    # keys and values of 2 heads in one layer, 8 wide, 4 bytes each
    assert price["cache_bytes_per_token"] == 2 * 4 * 2 * 8


# --- comparing -------------------------------------------------------------------------------------------------------


def rows(**others):
    """A fused model of mean loss 2 and 30 parameters, and others by (difference, p, parameters)."""
    made = [{"name": "fused", "mean": 2.0, "cost": {"parameters_per_token": 30}}]
    for name, (difference, p, size) in others.items():
        cost = {"parameters_per_token": size}
        made.append({"name": name, "mean": 2 + difference, "difference": difference, "p": p, "cost": cost})
    return {"rows": sorted(made, key=lambda row: row["mean"])}
