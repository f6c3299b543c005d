"""Folders that are odd and hold no mistake: they load, as what they say."""

import json
import shutil
import signal

import pytest
import torch
from torch import nn
from transformers import AutoModel

from modeling_ultrafuser import UltraFuserForCausalLM, UltraFuserModel
from modeling_ultrafuser.modeling_ultrafuser import UltraFuserPreTrainedModel
from tests.support.strange_folders import config, copied, edited, make_zoo, said, tensors


IDS = torch.arange(3, 20)[None]


@pytest.fixture(autouse=True)
def no_hang():
    """A pipe that is opened, or a name that is matched, may never end."""
    signal.alarm(120)
    yield
    signal.alarm(0)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return make_zoo(tmp_path_factory.mktemp("zoo"))


# ---------------------------------------------------------------------------------- what is no mistake


@pytest.mark.e2e
def test_the_backbone_alone_leaves_the_head_and_a_head_for_values_where_they_are(zoo, tmp_path):
    given = copied(zoo, "fused", tmp_path)
    tensors(lambda s: s.update({"v_head.summary.weight": torch.ones(1, 32)}))(given)
    assert UltraFuserModel.from_pretrained(given)(IDS).last_hidden_state.shape[-1] == 32
    assert AutoModel.from_pretrained(given).config.specialist_names == ["text", "code"]
    assert UltraFuserForCausalLM.from_pretrained(given)(IDS).logits.equal(
        UltraFuserForCausalLM.from_pretrained(zoo / "fused")(IDS).logits
    )


def test_a_class_with_a_head_of_its_own_gets_a_new_one(zoo, tmp_path):
    class Scored(UltraFuserPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.model = UltraFuserModel(config)
            self.score = nn.Linear(config.hidden_size, 1)
            self.post_init()

    scored, info = Scored.from_pretrained(zoo / "fused", output_loading_info=True)
    assert info["missing_keys"] == {"score.weight", "score.bias"}
    scored.save_pretrained(tmp_path / "scored")
    again = Scored.from_pretrained(tmp_path / "scored")
    assert again.score.weight.equal(scored.score.weight)


@pytest.mark.grid
@pytest.mark.parametrize("value", [[], "x", None])
def test_a_fused_folder_is_saved_again_whatever_it_says_of_its_code(value, zoo, tmp_path):
    given = copied(zoo, "fused", tmp_path)
    config(auto_map=value)(given)
    UltraFuserForCausalLM.from_pretrained(given).save_pretrained(tmp_path / "again")
    written = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "again", zoo / "fused")]
    assert written[0]["auto_map"] == written[1]["auto_map"]


@pytest.mark.parametrize("value", [False, None])
def test_a_configuration_that_asks_for_tuples_changes_nothing_but_the_type_of_outputs(value, zoo, tmp_path):
    given = copied(zoo, "fused", tmp_path)
    edited("config.json", lambda c: [part.update(return_dict=value) for part in (c, *c["specialists"])])(given)
    words = ("hello there", "--json")
    assert said(0, "explain", given, *words) == said(0, "explain", zoo / "fused", *words)
    model, expected = (UltraFuserForCausalLM.from_pretrained(folder) for folder in (given, zoo / "fused"))
    assert model(IDS)[0].equal(expected(IDS).logits)
    assert isinstance(model(IDS), tuple)
    assert model.specialist("code")(IDS).logits.equal(expected.specialist("code")(IDS).logits)


@pytest.mark.grid
@pytest.mark.parametrize("value", [0.5, ["a"], [0, 1], True, "yes"])
def test_what_a_specialists_configuration_says_of_outputs_is_the_fused_models_choice(value, zoo, tmp_path):
    folder, ids = shutil.copytree(zoo / "fused", tmp_path / "fused"), torch.arange(5, 12)[None]
    config = json.loads((folder / "config.json").read_text())
    config["specialists"][0]["output_hidden_states"] = value
    (folder / "config.json").write_text(json.dumps(config))
    output, expected = (UltraFuserForCausalLM.from_pretrained(f)(ids) for f in (folder, zoo / "fused"))
    assert torch.equal(output.logits, expected.logits)
    assert output.hidden_states is None


def test_sizes_that_differ_on_purpose_are_the_users_choice(zoo):
    other = UltraFuserForCausalLM.from_pretrained(zoo / "fused").config
    other.vocab_size = 310
    model = UltraFuserForCausalLM.from_pretrained(zoo / "fused", config=other, ignore_mismatched_sizes=True)
    assert model.lm_head.weight.shape[0] == 310
    model = UltraFuserForCausalLM.from_pretrained(zoo / "fused")
    model.resize_token_embeddings(310)
    assert model.lm_head.weight.shape[0] == 310


def test_old_rotary_frequencies_in_a_file_are_passed_over(zoo, tmp_path):
    given = copied(zoo, "code", tmp_path)
    tensors(lambda s: s.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))(given)
    assert said(0, "fuse", f"text={zoo}/text", f"code={given}", "--out", tmp_path / "out")
