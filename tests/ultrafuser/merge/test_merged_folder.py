"""`ultrafuser merge`: folders of specialists, or a fused one, become one ordinary model's folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.tiny import specialist
from tests.support.tuned import NAMES, make
from ultrafuser.cli.app import app
from ultrafuser.merge import written_tensors
from ultrafuser.merge.merged_folder import merge_folders
from ultrafuser.merge.merged_model import merge
from ultrafuser.merge.written_tensors import write_tensors


pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make(tmp_path_factory.mktemp("full"), layers=4, norms=True, tied=True)


@pytest.fixture
def base(sources):
    return sources["text"].removesuffix("text") + "base"


@pytest.fixture
def pairs(sources):
    return [f"{name}={folder}" for name, folder in sources.items()]


@pytest.fixture
def models(sources):
    return {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in sources.items()}


@pytest.fixture
def data(tmp_path):
    for seed, name in enumerate(NAMES):
        ids = torch.randint(3, 99, (4, 12), generator=torch.Generator().manual_seed(seed)).tolist()
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    return {name: str(tmp_path / f"{name}.jsonl") for name in NAMES}


def run(*arguments):
    return CliRunner().invoke(app, ["merge", *map(str, arguments)], env={"COLUMNS": "200"})


def states_equal(folder, model):
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    own = model.state_dict()
    return state.keys() == own.keys() and all(torch.equal(state[key], own[key]) for key in state)


@pytest.mark.parametrize(
    ("method", "given", "options"),
    [
        ("ties:0.2", {}, {}),
        ("dare", {"coefficients": "0.3", "seed": 5}, {"weight": 0.3, "seed": 5}),
        ("task_arithmetic", {"lines": "0.33,0.5"}, {"weight": 0.33, "slope": 0.5}),
    ],
)
def test_a_folder_merged_tensor_by_tensor_is_the_model_merged_in_memory(
    method, given, options, pairs, base, models, tmp_path
):
    merge_folders(pairs, tmp_path / "out", method=method, base=base, **given)
    merged = merge(models, method, base=AutoModelForCausalLM.from_pretrained(base), **options)
    assert states_equal(tmp_path / "out", merged)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".jinja") == [
        *("README.md", "config.json", "generation_config.json", "merge.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]


def test_the_command_writes_a_stock_folder_with_its_table_and_card_which_it_reads_again(pairs, base, tmp_path):
    out = tmp_path / "out"
    done = run(*pairs, "--base", base, "--method", "ties", "--coefficients", "text=1,code=0.5,math=0", "--out", out)
    assert done.exit_code == 0, done.output
    assert "all layers: text 1, code 0.5, math 0" in done.output
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert "auto_map" not in config
    assert AutoTokenizer.from_pretrained(out)("a b")["input_ids"]
    record = json.loads((out / "merge.json").read_text())
    assert list(record["coefficients"]) == ["embeddings", *(f"layer {k}" for k in range(4)), "last norm and head"]
    assert record["method"] == "ties"
    card = (out / "README.md").read_text()
    assert "| all | 1 | 0.5 | 0 |" in card
    assert "The licence of `text` is unknown" in card
    table = {**record["coefficients"], "layer 2": {"text": 0, "code": 0, "math": 1}}
    (tmp_path / "table.json").write_text(json.dumps({"coefficients": table}))
    done = run(
        *pairs, "--base", base, "--method", "task_arithmetic", "--coefficients", tmp_path / "table.json", "--out", out
    )
    assert "Nothing is overwritten unasked" in done.output
    done = run(
        *pairs,
        "--base",
        base,
        "--method",
        "task_arithmetic",
        "--coefficients",
        tmp_path / "table.json",
        "--out",
        tmp_path / "2",
    )
    assert "layer 2: text 0, code 0, math 1" in done.output
    key = "model.layers.2.mlp.up_proj.weight"
    math = load_file(f"{pairs[2].partition('=')[2]}/model.safetensors")
    assert torch.equal(load_file(tmp_path / "2" / "model.safetensors")[key], math[key])


def test_a_fused_folder_gives_what_its_specialists_give(pairs, sources, base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    UltraFuserForCausalLM.from_specialists(sources).save_pretrained(tmp_path / "fused")
    tokenizer.save_pretrained(tmp_path / "fused")
    merge_folders([str(tmp_path / "fused")], tmp_path / "one", method="pcb", base=base)
    merge_folders(pairs, tmp_path / "two", method="pcb", base=base)
    assert states_equal(tmp_path / "one", AutoModelForCausalLM.from_pretrained(tmp_path / "two"))
    assert json.loads((tmp_path / "one" / "merge.json").read_text())["sources"] == {
        **dict.fromkeys(NAMES),
        "base": base,
    }


def test_regmean_predicts_rows_of_all_specialists_better_than_the_average_does(pairs, data, models, tmp_path):
    merge_folders(pairs, tmp_path / "fit", method="regmean", data=data)
    merge_folders(pairs, tmp_path / "mean")
    layer = "layers.0.self_attn.q_proj"
    errors = {}
    for out in ("fit", "mean"):
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / out)
        errors[out] = 0.0
        for name, model in models.items():
            ids = torch.tensor([json.loads(line)["input_ids"] for line in Path(data[name]).read_text().splitlines()])
            with torch.no_grad():
                read = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
                gap = merged.model.get_submodule(layer)(read) - model.model.get_submodule(layer)(read)
            errors[out] += gap.square().mean().item()
    # the layer's inputs are those of each specialist, which the fit is made for
    assert errors["fit"] < 0.9 * errors["mean"]
    assert not list((tmp_path / "fit").glob("inputs*"))


def test_a_specialist_with_a_head_of_its_own_unties_the_merge(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    other = specialist(layers=4, tied=False)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.lm_head.weight.add_(0.5)
    other.save_pretrained(tmp_path / "own")
    merge_folders([f"a={base}", f"b={tmp_path / 'own'}"], tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged.lm_head.weight, model.lm_head.weight + 0.25)
    torch.testing.assert_close(merged.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_regmean_averages_a_head_that_one_specialist_ties(base, data, tmp_path):
    model, other = AutoModelForCausalLM.from_pretrained(base), specialist(layers=4, tied=False)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.lm_head.weight.add_(0.5)
    other.save_pretrained(tmp_path / "own")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "own")
    rows = {"a": data["text"], "b": data["code"]}
    merge_folders([f"a={base}", f"b={tmp_path / 'own'}"], tmp_path / "out", method="regmean", data=rows)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged.lm_head.weight, model.lm_head.weight + 0.25)


def test_show_tells_how_far_changes_agree(pairs, base):
    done = run(*pairs, "--base", base, "--show")
    assert done.exit_code == 0, done.output
    [row] = [line for line in done.output.splitlines() if "layer 2" in line]
    cosine, signs, *sizes = [
        float(cell.strip(" %│")) for cell in row.replace("layer 2", "").split("│") if cell.strip()
    ]
    assert abs(cosine) < 0.05
    assert signs == pytest.approx(50, abs=2)
    assert len(sizes) == 3
    assert min(sizes) > 1


def test_files_are_written_one_after_another(tmp_path, monkeypatch):
    monkeypatch.setattr(written_tensors, "MOST_BYTES", 100)
    tensors, order = {f"t{k}": torch.full((10,), float(k)) for k in range(5)}, []

    def tensor(key):
        order.append((key, len(list(tmp_path.glob("*.safetensors")))))
        return tensors[key]

    write_tensors({key: (t.dtype, t.shape) for key, t in tensors.items()}, tensor, tmp_path)
    assert order == [("t0", 0), ("t1", 0), ("t2", 1), ("t3", 1), ("t4", 2)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(torch.equal(load_file(tmp_path / file)[key], tensors[key]) for key, file in index.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "ties"], "no base was given"),
        (["--method", "best"], "Unknown merge 'best'"),
        (["--coefficients", "0.5"], "coefficients have a mean of 1"),
        (["--method", "layer_swap"], "there are 3"),
        (["--method", "regmean"], "rows of []"),
        (["--data", "text=x.jsonl"], "reads no rows"),
        (["--lines", "1,1", "--coefficients", "1"], "Either makes the whole table"),
        (["--lines", "1", "--base", "BASE"], "a start and a slope"),
        (["--lines", "nan,1", "--base", "BASE"], "a start and a slope"),
        (["--method", "layer_swap", "--coefficients", "1"], "decides itself"),
        (["--method", "regmean", "--coefficients", "0.5"], "decides itself"),
        (["--coefficients", "text=1"], "Name them all"),
        (["--coefficients", "missing.json"], "There is no file 'missing.json'"),
        (["--search", "best"], "Choose one of ['map', 'simplex']"),
        (["--search", "map", "--lines", "1,1"], "leave --coefficients and --lines out"),
        (["--show", "--base", "BASE", "--method", "ties"], "leave out all options but --base"),
        (["--search", "map"], "no rows and no base"),
        (["--show"], "Pass --base"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_a_sentence(options, message, pairs, base, tmp_path):
    options = [base if word == "BASE" else word for word in options]
    done = run(*pairs, *options, *([] if "--show" in options else ["--out", tmp_path / "out"]))
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())


def test_models_of_another_shape_or_start_are_refused(pairs, tmp_path):
    for name, layers in (("deep", 5), ("stranger", 4)):
        torch.manual_seed(7)
        specialist(layers=layers, tied=True).save_pretrained(tmp_path / name)
    done = run(*pairs, f"deep={tmp_path / 'deep'}", "--out", tmp_path / "out")
    assert "`model.layers.4.input_layernorm.weight` is None in 'text' and" in done.output
    done = run(*pairs, f"stranger={tmp_path / 'stranger'}", "--out", tmp_path / "out")
    assert "has nothing to do with that of 'text'" in done.output
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    done = run(*pairs, f"lora={tmp_path / 'lora'}", "--out", tmp_path / "out")
    assert "is a LoRA adapter" in done.output


def test_fields_that_change_nothing_may_differ_from_the_base(tmp_path):
    # as those of Qwen2.5-1.5B and its Instruct
    for name, fields in (
        ("base", {"max_window_layers": 28, "use_mrope": False}),
        ("tuned", {"max_window_layers": 21}),
    ):
        torch.manual_seed(0)
        specialist("qwen2", layers=1).save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | fields))
    merge_folders([f"a={tmp_path / 'tuned'}"], tmp_path / "out", method="task_arithmetic", base=str(tmp_path / "base"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.max_window_layers == 21


def test_numbers_that_16_bits_do_not_hold_are_refused(tmp_path):
    for name, number in (("base", 0.0), ("tuned", 60_000.0)):
        torch.manual_seed(0)
        model = specialist(layers=1).half()
        model.model.norm.weight.data.fill_(number)
        model.save_pretrained(tmp_path / name)
    options = {"method": "task_arithmetic", "base": str(tmp_path / "base"), "coefficients": "2"}
    with pytest.raises(ValueError, match="`model.norm.weight` of the merged model holds numbers that are not finite"):
        merge_folders([f"a={tmp_path / 'tuned'}"], tmp_path / "out", **options)


def test_numbers_that_are_not_finite_are_refused(sources, tmp_path):
    state = load_file(f"{sources['code']}/model.safetensors")
    state["model.norm.weight"][3] = float("inf")
    shutil.copy(f"{sources['code']}/config.json", tmp_path)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="`model.norm.weight` of the merged model holds numbers that are not finite"):
        merge_folders([f"text={sources['text']}", f"code={tmp_path}"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
