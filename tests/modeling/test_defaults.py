"""What a new fused model and stage one are where nothing is said."""

import logging

import pytest
import torch
from datasets import Dataset

from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM
from modeling_ultrafuser.fusions_ultrafuser import FUSIONS
from modeling_ultrafuser.gates_ultrafuser import DEFAULT_GATE, GATES, gate_settings
from modeling_ultrafuser.sparsifiers_ultrafuser import SPARSIFIERS
from tests.support.stages import BOTH, domains, trainer
from tests.support.tiny import tokenizer
from trainers import GateStageConfig, GateTrainer, JointStageConfig, JointTrainer
from trainers.mixed import MIXED
from ultrafuser import strategies
from ultrafuser.build.fusion_recipe import FusionSettings


SIZES = {"text": 8, "code": 6, "math": 9}
OPEN = {"mixed_share": None, "gate_dropout": None, "examples_per_domain": 4, "per_device_train_batch_size": 4}


def gate_of(model):
    """What the configuration says of the gate, and the shapes of its tensors."""
    config = model.config
    shapes = {name: tuple(tensor.shape) for name, tensor in model.model.fusion_gate.state_dict().items()}
    return (config.gate, config.gate_hidden_size, config.gate_calibration), shapes


# ---- the gate


def test_the_default_gate_is_one_word_everywhere(specialists, tmp_path):
    assert strategies.DEFAULT_GATE == DEFAULT_GATE == FusionSettings().gate
    model = UltraFuserForCausalLM.from_specialists(specialists)
    assert gate_of(model)[0] == ("cross", 128, True)
    assert gate_of(model) == gate_of(UltraFuserForCausalLM.from_specialists(specialists, gate=DEFAULT_GATE))
    model.save_pretrained(tmp_path)
    assert gate_of(UltraFuserForCausalLM.from_pretrained(tmp_path)) == gate_of(model)


@pytest.mark.parametrize(
    ("module", "table"),
    [("gates_ultrafuser", GATES), ("fusions_ultrafuser", FUSIONS), ("sparsifiers_ultrafuser", SPARSIFIERS)],
)
def test_help_says_of_every_strategy_what_its_class_says(module, table):
    found = strategies.summaries(module, module.removesuffix("_ultrafuser").upper())
    assert found == {name: strategy.__doc__.partition("\n")[0] for name, strategy in table.items()}


def test_a_folder_that_says_nothing_means_the_papers_gate():
    config = UltraFuserConfig()
    assert (config.gate, config.gate_hidden_size, config.gate_calibration) == ("mlp", 512, False)


@pytest.mark.grid
@pytest.mark.parametrize(
    ("word", "fields"),
    [
        ("mlp", {"gate": "mlp", "gate_hidden_size": 512}),
        ("mlp:64", {"gate": "mlp", "gate_hidden_size": 64}),
        ("cross:8+calibration", {"gate": "cross", "gate_hidden_size": 8, "gate_calibration": True}),
        ("linear+calibration", {"gate": "linear", "gate_calibration": True}),
        ("constant", {"gate": "constant", "gate_calibration": False}),
    ],
)
def test_a_word_says_what_fields_say(word, fields, specialists):
    in_a_word, in_fields = (
        UltraFuserForCausalLM.from_specialists(specialists, **given) for given in ({"gate": word}, fields)
    )
    assert gate_of(in_a_word) == gate_of(in_fields)
    assert gate_of(in_a_word)[0][0] == fields["gate"]
    assert in_a_word.config.gate_hidden_size == fields.get("gate_hidden_size", 512)
    assert in_a_word.config.gate_calibration is fields.get("gate_calibration", False)


@pytest.mark.grid
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"gate_hidden_size": 8}, ("cross", 8, True)),
        ({"gate_calibration": False}, ("cross", 128, False)),
        ({"gate": "mlp:64", "gate_hidden_size": 16}, ("mlp", 16, False)),
        ({"gate": "cross:64", "gate_calibration": True}, ("cross", 64, True)),
        ({"gate": "cross:64+calibration", "gate_hidden_size": 8, "gate_calibration": False}, ("cross", 8, False)),
    ],
)
def test_a_field_that_is_given_goes_before_the_word(given, expected, specialists):
    model = UltraFuserForCausalLM.from_specialists(specialists, **given)
    assert gate_of(model)[0] == expected
    widths = [len(t) for name, t in model.model.fusion_gate.named_parameters() if name == "hidden_bias"]
    assert widths == [expected[1]]


@pytest.mark.parametrize(
    "word",
    [
        "moe",
        "",
        "mlp:0",
        "mlp:",
        "mlp:wide",
        "mlp:65537",
        "linear:4",
        "anchor",
        "anchor:",
        "mlp+calibration",
        "cross+calibration:8",
        "MLP",
    ],
)
def test_a_word_for_no_gate_is_refused_before_weights_are_read(word):
    with pytest.raises(ValueError, match="A gate is one of .* But got .* Choose one of those"):
        UltraFuserForCausalLM.from_specialists({"text": "/nowhere", "code": "/nowhere"}, gate=word)
    with pytest.raises(ValueError, match="A gate is one of"):
        gate_settings(word)


def test_a_new_default_gate_is_the_plain_average(specialists):
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        found = UltraFuserForCausalLM.from_specialists(specialists)(ids)
        average = sum(model(ids).logits for model in specialists.values()) / 3
    torch.testing.assert_close(found.gate_weights, torch.full_like(found.gate_weights, 1 / 3))
    assert torch.equal(found.logit_scales, torch.ones_like(found.logit_scales))
    torch.testing.assert_close(found.logits, average, rtol=1e-4, atol=1e-5)


# ---- stage one


def test_the_stages_have_settings_of_their_own():
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none"}
    one, two = GateStageConfig("one", **quiet), JointStageConfig("two", **quiet)
    assert (one.weight_decay, one.mixed_share, one.gate_dropout) == (0.1, None, None)
    assert (two.weight_decay, two.mixed_share, two.gate_dropout) == (0.0, None, None)
    assert one.early_stopping is two.early_stopping is None


def test_stage_one_mixes_domains_and_hides_states(fused, tmp_path):
    run = trainer(GateTrainer, fused, tmp_path, **OPEN)
    assert (run.args.mixed_share, run.args.gate_dropout) == (0.25, 0.1)
    assert run.fused.model.fusion_gate.dropout == 0.1
    places = run.train_dataset["domain"]
    first = [places[i] for i in run.sampler][:12]
    assert {name: first.count(name) for name in (*SIZES, MIXED)} == {"text": 3, "code": 3, "math": 3, MIXED: 3}
    run.train()
    assert run.state.log_history[0]["mix/mixed"] == 0.25


def test_what_is_given_stays(fused, tmp_path):
    run = trainer(GateTrainer, fused, tmp_path, **{**OPEN, "mixed_share": 0.0, "gate_dropout": 0.0})
    assert (run.args.mixed_share, run.args.gate_dropout) == (0.0, 0.0)
    assert set(run.train_dataset["domain"]) == set(SIZES)


@pytest.mark.grid
@pytest.mark.parametrize(
    ("data", "settings"),
    [
        ({"text": 8}, {}),
        ({MIXED: 8, "code": 8}, {}),
        (SIZES, {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}),
    ],
    ids=["one domain", "a domain of that name", "rows as they are"],
)
def test_where_domains_cannot_be_mixed_they_are_not(data, settings, fused, tmp_path):
    if settings:
        ids = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
        given = {name: Dataset.from_list([ids] * size) for name, size in data.items()}
    else:
        given = domains(data)
    run = trainer(GateTrainer, fused, tmp_path, given, **{**OPEN, **settings})
    assert (run.args.mixed_share, run.args.gate_dropout) == (0.0, 0.1)
    assert run.drawn == run.domains == sorted(data)
    assert len(run.train_dataset) == sum(data.values())
    run.train()


def test_a_gate_that_reads_no_states_has_none_hidden(specialists, tmp_path):
    model = UltraFuserForCausalLM.from_specialists(specialists, gate="constant")
    run = trainer(GateTrainer, model, tmp_path, **OPEN)
    assert (run.args.mixed_share, run.args.gate_dropout) == (0.25, 0.0)
    run.train()


def test_stage_two_does_neither(fused, tmp_path):
    run = trainer(JointTrainer, fused, tmp_path, **OPEN)
    assert (run.args.mixed_share, run.args.gate_dropout) == (0.0, 0.0)
    assert run.drawn == run.domains


@pytest.mark.e2e
@BOTH
def test_the_rate_that_is_not_given_suits_the_gate(stage, specialists, tmp_path):
    rates = {}
    for gate in ("mlp", "cross"):
        model = UltraFuserForCausalLM.from_specialists(specialists, gate=gate)
        rates[gate] = trainer(stage, model, tmp_path, learning_rate=None).args.learning_rate
    expected = {"mlp": 1e-2, "cross": 3e-3} if stage is GateTrainer else {"mlp": 3e-4, "cross": 3e-4}
    assert rates == pytest.approx(expected)


# ---- what is said, and what is not


@pytest.mark.grid
@pytest.mark.parametrize(
    ("little", "gate", "told"), [(10_000, "cross:8", True), (4, "cross:8", False), (10_000, "linear", False)]
)
def test_little_text_for_a_wide_gate_is_told(little, gate, told, specialists, tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr("trainers.stage_gate.print_line", heard.append)
    monkeypatch.setattr("trainers.stage_gate.LITTLE", little)
    trainer(GateTrainer, UltraFuserForCausalLM.from_specialists(specialists, gate=gate), tmp_path)
    assert any("With so little text" in line for line in heard) == told


def test_loading_tells_of_no_layers_that_are_not_sharded(specialists, tmp_path, caplog, monkeypatch):
    # transformers' loggers keep what they log to themselves
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for name, model in specialists.items():
        model.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    UltraFuserForCausalLM.from_specialists({name: tmp_path / name for name in specialists})
    assert "sharded" not in caplog.text
