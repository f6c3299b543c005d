"""Full models that were tuned from one base become LoRA specialists of it."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.refusals_ultrafuser import Refusal
from tests.support.mixes import prompt
from tests.support.tiny import specialist
from tests.support.tuned import NAMES, make
from ultrafuser.compress import gain
from ultrafuser.compress.compressing import Compression
from ultrafuser.compress.factors import Limits, factors


pytestmark = pytest.mark.e2e


WHOLE = 1000


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return make(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def low(tmp_path_factory):
    return make(tmp_path_factory.mktemp("low"), rank=3, tied=True)


def compressed(sources, out, *, base=None, shared="base", say=lambda _: None, **limits):
    base = base or sources["text"].removesuffix("text") + "base"
    pairs = [f"{name}={folder}" for name, folder in sources.items()]
    return Compression(pairs, base, Limits(**limits), shared).run(out, say)


def fused(sources, **options):
    return UltraFuserForCausalLM.from_specialists(sources, gate="uniform", **options)


def adapters(out):
    return {name: str(out / name) for name in NAMES}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("fusion", ["logits", "probabilities"])
@torch.no_grad()
def test_at_full_rank_the_fused_model_is_that_of_the_full_models(fusion, full, tmp_path):
    compressed(full, tmp_path / "out", rank=WHOLE)
    small, large, ids = fused(adapters(tmp_path / "out"), fusion=fusion), fused(full, fusion=fusion), prompt()
    close(small(ids).logits, large(ids).logits)
    for name in NAMES:
        close(small.specialist(name)(ids).logits, AutoModelForCausalLM.from_pretrained(full[name])(ids).logits)


@torch.no_grad()
def test_a_change_of_rank_3_is_exact_at_rank_3_and_no_layer_takes_more(low, tmp_path):
    reports = compressed(low, tmp_path / "out", rank=WHOLE)
    assert {about["rank"] for report in reports.values() for about in report["layers"].values()} == {3}
    assert max(report["error"] for report in reports.values()) < 1e-5
    small, ids = fused(adapters(tmp_path / "out")), prompt()
    close(small(ids).logits, fused(low)(ids).logits)
    assert small.config.adapters | {"target_modules": []} == {
        "rank": 3,
        "target_modules": [],
        "embedding_rank": 3,
        "head_rank": 3,
    }
    assert small.config.hidden_size == 32 + 3 * 3


@torch.no_grad()
def test_peft_reads_what_we_fuse_and_merges_it(low, tmp_path):
    compressed(low, tmp_path / "out", rank=2)
    small, ids = fused(adapters(tmp_path / "out")), prompt()
    for name in NAMES:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
        model = PeftModel.from_pretrained(base, tmp_path / "out" / name).eval()
        expected = small.specialist(name)(ids).logits
        close(model(input_ids=ids).logits, expected)
        # of a tied base both changes would be added to one tensor
        close(model.merge_and_unload()(input_ids=ids).logits, expected)


def test_a_lower_rank_keeps_the_largest_singular_values(full, tmp_path):
    reports = compressed(full, tmp_path / "out", rank=5)
    change = _weight(full["code"], LAYER) - _weight(full["text"].replace("text", "base"), LAYER)
    values = torch.linalg.svdvals(change)
    expected = (values[5:].square().sum() / values.square().sum()).sqrt().item()
    assert reports["code"]["layers"][LAYER] == {"rank": 5, "error": pytest.approx(expected, rel=1e-4)}
    state = load_file(tmp_path / "out" / "code" / "adapter_model.safetensors")
    a, b = (state[f"base_model.model.{LAYER}.lora_{part}.weight"] for part in "AB")
    assert a.shape == (5, 32)
    close((b @ a).norm().item() ** 2, values[:5].square().sum().item())
    assert reports["code"]["numbers"] == sum(t.numel() for t in state.values())


LAYER = "model.layers.0.mlp.up_proj"


def _weight(folder, layer):
    return load_file(f"{folder}/model.safetensors")[f"{layer}.weight"]


def test_every_layer_meets_the_error_with_the_least_rank_that_does(full, tmp_path):
    reports = compressed(full, tmp_path / "out", error=0.4)
    base = load_file(f"{full['text'].replace('text', 'base')}/model.safetensors")
    for name, report in reports.items():
        own = load_file(f"{full[name]}/model.safetensors")
        assert len(report["layers"]) == 2 * 7 + 2
        for layer, about in report["layers"].items():
            assert about["error"] <= 0.4 + 1e-5
            values = torch.linalg.svdvals(own[f"{layer}.weight"] - base[f"{layer}.weight"])
            one_less = values[about["rank"] - 1 :].norm() / values.norm()
            assert one_less > 0.4
    config = json.loads((tmp_path / "out" / "code" / "adapter_config.json").read_text())
    ranks = {layer: about["rank"] for layer, about in reports["code"]["layers"].items()}
    assert config["r"] == config["lora_alpha"] == max(ranks.values())
    assert config["rank_pattern"] == config["alpha_pattern"] == {n: r for n, r in ranks.items() if r < config["r"]}
    assert len(set(ranks.values())) > 1


def test_the_rank_bounds_what_an_error_asks_for(full, tmp_path):
    reports = compressed(full, tmp_path / "out", error=0.01, rank=4)
    assert {about["rank"] for about in reports["text"]["layers"].values()} == {4}


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox"])
@torch.no_grad()
def test_what_adapters_hold_of_other_families_is_exact(family, tmp_path):
    sources = make(tmp_path, family, tied=family != "gpt_neox", rank=2)
    said = []
    compressed(sources, tmp_path / "out", rank=WHOLE, say=said.append)
    small, ids = fused(adapters(tmp_path / "out")), prompt()
    expected = {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in sources.items()}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    for name, model in expected.items():
        if family == "gemma2":
            # its embedding is no plain table: all have the mean
            model.get_output_embeddings().weight = nn.Parameter(model.get_output_embeddings().weight.clone())
            model.model.embed_tokens.weight.copy_(base.model.embed_tokens.weight)
        if family == "gpt2":
            model.transformer.wpe.weight.copy_(base.transformer.wpe.weight)
        close(small.specialist(name)(ids).logits, model(ids).logits)
    kinds = {"gpt2": "wpe", "gemma2": "embed_tokens"}
    assert [kinds[family] in line for line in said] == [True] if family in kinds else said == []


# ---------------------------------------------------------------------------------------------- what is shared


@torch.no_grad()
def test_norms_are_averaged_into_the_base_and_the_difference_is_told(tmp_path):
    sources, said = make(tmp_path, norms=True), []
    compressed(sources, tmp_path / "out", rank=WHOLE, say=said.append)
    [line] = said
    assert line.startswith("5 tensors that LoRA does not hold (input_layernorm, norm, post_attention_layernorm)")
    states = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in sources.values()]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base").state_dict()
    close(base["model.norm.weight"], torch.stack([s["model.norm.weight"] for s in states]).mean(0))


def test_what_no_specialist_has_changed_stays_as_it_is_bit_by_bit(full, tmp_path):
    compressed(full, tmp_path / "out", rank=1)
    own, other = (
        load_file(f"{folder}/model.safetensors") for folder in (full["text"][:-4] + "base", tmp_path / "out" / "base")
    )
    assert own.keys() == other.keys()
    assert all(torch.equal(own[key], other[key]) for key in own)


@torch.no_grad()
def test_adapters_of_the_mean_give_the_full_models_at_full_rank(full, tmp_path):
    compressed(full, tmp_path / "out", rank=WHOLE, shared="mean")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base").state_dict()
    states = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in full.values()]
    close(base[f"{LAYER}.weight"], torch.stack([s[f"{LAYER}.weight"] for s in states]).mean(0))
    ids = prompt()
    actual, expected = fused(adapters(tmp_path / "out"))(ids).logits, fused(full)(ids).logits
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_specialist_that_equals_the_base_gets_an_empty_adapter_and_a_message(full, tmp_path):
    base, said = full["text"].removesuffix("text") + "base", []
    sources = {"same": base, "code": full["code"]}
    reports = compressed(sources, tmp_path / "out", base=base, rank=4, say=said.append)
    assert reports["same"]["numbers"] == 0
    assert said == [
        f"same: no layer differs from the base, so its adapter is empty. Fuse {tmp_path / 'out' / 'base'} in its place."
    ]
    small, ids = fused({name: str(tmp_path / "out" / name) for name in sources}), prompt()
    expected = AutoModelForCausalLM.from_pretrained(base)
    close(small.specialist("same")(ids).logits, expected(ids).logits)
    model = PeftModel.from_pretrained(expected, tmp_path / "out" / "same")
    close(model(input_ids=ids).logits, small.specialist("same")(ids).logits)


# ---------------------------------------------------------------------------------------------- goes on, or refuses


def test_a_run_that_was_stopped_goes_on_with_what_is_missing(full, tmp_path, monkeypatch):
    plain, out = Compression._write, tmp_path / "out"

    def stopped(self, out, base, specialist):
        if specialist.name == "math":
            raise KeyboardInterrupt
        return plain(self, out, base, specialist)

    monkeypatch.setattr(Compression, "_write", stopped)
    with pytest.raises(KeyboardInterrupt):
        compressed(full, out, rank=2)
    assert not (out / "math").exists()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    monkeypatch.setattr(Compression, "_write", plain)
    reports = compressed(full, out, rank=2)
    assert list(reports) == list(NAMES)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    with pytest.raises(FileExistsError, match="compressed from others or otherwise"):
        compressed(full, out, rank=3)


LIMITS = {
    "neither": ({}, "neither a rank nor an error is given"),
    "a rank of 0": ({"rank": 0}, "the rank is 0"),
    "an error of 0": ({"error": 0.0}, "the error is 0.0"),
    "an error of 1": ({"error": 1.0}, "the error is 1.0"),
    "no number": ({"error": float("nan")}, "the error is nan"),
}


@pytest.mark.parametrize("case", LIMITS)
def test_limits_that_cannot_be_are_refused(case, full, tmp_path):
    fields, said = LIMITS[case]
    with pytest.raises(Refusal, match=f"(?i){said}"):
        compressed(full, tmp_path / "out", **fields)
    assert not (tmp_path / "out").exists()


MODELS = {
    "another shape": (
        lambda: specialist(intermediate_size=48),
        r"`model.layers.0.mlp.down_proj.weight` is \(32, 64\)",
    ),
    "fewer layers": (lambda: specialist(layers=1), r"`model.layers.1.*` is \(.*\) in the base and None in 'odd'"),
    "other positions": (lambda: specialist(rope_theta=5e5), "`rope_parameters` is"),
    "other heads": (lambda: specialist(num_attention_heads=2, num_key_value_heads=1, head_dim=16), "`head_dim` is 8"),
    "another start": (lambda: specialist(), "has nothing to do with that of the base"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_was_not_tuned_from_the_base_is_refused_before_anything_is_written(case, full, tmp_path):
    make_one, said = MODELS[case]
    torch.manual_seed(5)
    make_one().save_pretrained(tmp_path / "odd")
    with pytest.raises(Refusal, match=said):
        compressed({**full, "odd": str(tmp_path / "odd")}, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


FOLDERS = {
    "quantised": (lambda c: c | {"quantization_config": {"quant_method": "fp8"}}, "quantised weights"),
    "fused": (lambda c: c | {"model_type": "ultrafuser", "specialist_names": ["a", "b"]}, "fused"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_are_no_plain_model_are_refused(case, full, tmp_path):
    change, said = FOLDERS[case]
    (tmp_path / "odd").mkdir()
    config = json.loads(Path(full["text"], "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps(change(config)))
    with pytest.raises(ValueError, match=said):
        compressed({**full, "odd": str(tmp_path / "odd")}, tmp_path / "out", rank=2)


def test_a_specialist_called_base_and_an_unknown_sharing_are_refused(full, tmp_path):
    with pytest.raises(Refusal, match="is called 'base'"):
        compressed({"base": full["text"]}, tmp_path / "out", base=full["text"], rank=2)
    with pytest.raises(Refusal, match="`shared` is 'sum'"):
        compressed(full, tmp_path / "out", shared="sum", rank=2)


# ---------------------------------------------------------------------------------------------- decompositions


def test_few_singular_vectors_of_a_wide_matrix_are_nearly_as_good_as_the_best(monkeypatch):
    torch.manual_seed(0)
    change = torch.randn(200, 300) @ torch.diag(torch.linspace(2, 0.1, 300))
    best = factors(change, Limits(20))
    monkeypatch.setattr("ultrafuser.compress.factors.WIDEST", 100)
    found = factors(change, Limits(20))
    assert best.error < found.error + 1e-6 < best.error * 1.01
    assert found.left.shape == (200, 20)
    assert factors(torch.zeros(5, 4), Limits(2)) is None


def test_a_model_that_tuning_made_no_better_is_told_apart_from_one_that_lost_its_gain():
    losses = {"base": 2.0, "shared": 2.0, "compressed": 2.0}
    worse = losses | {"full": 2.1, "kept": float("nan")}
    lost = losses | {"full": 1.0, "kept": 0.0}
    told = gain.warning({"code": worse})
    assert "['code'] predict these data no better than their base" in told
    assert "--rank" not in told
    told = gain.warning({"code": worse, "text": lost})
    assert "text lost 100% of the gain of tuning. Choose a higher --rank" in told
    assert "['code'] predict" in told
    assert gain.warning({"text": lost | {"kept": 0.95}}) is None
    report = {"layers": {}, "numbers": 1, "of": 2}
    cells = [list(column.cells)[0] for column in gain.table({"code": report}, {"code": worse}).columns]
    assert cells[-1] == "no gain"
