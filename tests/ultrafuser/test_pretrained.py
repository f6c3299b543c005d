"""Tokenizers of ordinary folders that commands write: read by transformers 4, too, whose names for them differ."""

import json

import pytest
from transformers import AutoTokenizer

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.tiny import specialist, tokenizer
from ultrafuser.build.specialist_edits import take_out
from ultrafuser.merge.merged_folder import merge_folders
from ultrafuser.pretrained import save_tokenizer


TEXT = "<call>2 + 2</call>\n"


def with_special_tokens():
    made = tokenizer(chat_template="{{ messages }}")
    made.add_special_tokens({"extra_special_tokens": ["<call>", "</call>"]})
    return made


def settings(folder):
    return json.loads((folder / "tokenizer_config.json").read_text())


def test_transformers_5_reads_the_names_of_transformers_4_as_the_same_tokenizer(tmp_path):
    made = with_special_tokens()
    save_tokenizer(tmp_path, made)
    names = settings(tmp_path)
    assert names["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert names["additional_special_tokens"] == ["<call>", "</call>"]
    assert "extra_special_tokens" not in names
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXT)["input_ids"] == made(TEXT)["input_ids"]
    assert again.extra_special_tokens == made.extra_special_tokens
    assert again.decode(made(TEXT)["input_ids"], skip_special_tokens=True) == "2 + 2\n"
    assert (again.chat_template, again.padding_side) == (made.chat_template, made.padding_side)
    assert again.special_tokens_map == made.special_tokens_map


def specialist_of(fused, out):
    take_out(fused, "code", out)


def merged_of(fused, out):
    merge_folders([str(fused)], out)


@pytest.mark.parametrize("make", [specialist_of, merged_of])
def test_what_becomes_of_a_fused_folder_has_a_tokenizer_that_transformers_4_reads(make, tmp_path):
    fused, out = tmp_path / "fused", tmp_path / "out"
    one = specialist(layers=1)
    UltraFuserForCausalLM.from_specialists({"text": one, "code": one}).save_pretrained(fused)
    with_special_tokens().save_pretrained(fused)
    assert settings(fused)["tokenizer_class"] == "TokenizersBackend"
    make(fused, out)
    assert settings(out)["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in settings(out)
