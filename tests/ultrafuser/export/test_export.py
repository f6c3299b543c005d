"""`ultrafuser export`: specialists as a stock mixture of experts."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.mixes import prompt
from tests.support.tiny import specialist, tokenizer
from tests.support.tuned import NAMES, make
from ultrafuser.cli.app import app
from ultrafuser.evaluation.measurement import held_out, mean_loss
from ultrafuser.export.moe_folder import export
from ultrafuser.export.routers import router_rows


pytestmark = pytest.mark.e2e
LAYOUTS = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe"}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make(tmp_path_factory.mktemp("full"), rank=2, norms=True)


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    return write_data(tmp_path / "data", NAMES)


def write_data(folder, names):
    for seed, name in enumerate(names):
        ids = torch.randint(3, 99, (6, 40), generator=torch.Generator().manual_seed(seed)).tolist()
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    return {name: str(folder / f"{name}.jsonl") for name in names}


def pairs(sources):
    return [f"{name}={folder}" for name, folder in sources.items()]


def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "tied"),
    [("llama", False), ("qwen2", True), *(slow("mistral", t) for t in (False, True)), slow("llama", True)],
)
@torch.no_grad()
def test_specialists_that_are_the_same_give_their_logits_whatever_the_router(family, tied, tmp_path):
    sources = make(tmp_path, family, rank=2, tied=tied)
    same = {"a": sources["text"], "b": sources["text"], "c": sources["text"]}
    export(pairs(same), LAYOUTS[family], tmp_path / "out", write_data(tmp_path, "abc"))
    model, expected = load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(sources["text"]).eval()
    assert model.config.model_type == LAYOUTS[family]
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    ids = prompt()
    close(model(ids).logits, expected(ids).logits)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.normal_()
    close(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("family", [slow("llama"), "qwen2"])
@torch.no_grad()
def test_a_router_that_prefers_one_expert_gives_the_donor_with_that_feed_forward(family, tmp_path):
    sources = make(tmp_path, family, rank=2)
    export(pairs(sources), LAYOUTS[family], tmp_path / "out", write_data(tmp_path, NAMES), donor="code")
    model, expected = load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(sources["code"]).eval()
    math = AutoModelForCausalLM.from_pretrained(sources["math"])
    for layer, own, other in zip(model.model.layers, expected.model.layers, math.model.layers, strict=True):
        own.mlp = other.mlp
        layer.mlp.gate.forward = lambda states: (None, torch.ones(len(states), 1), torch.full((len(states), 1), 2))
    ids = prompt()
    close(model(ids).logits, expected(ids).logits)


def test_a_router_reads_the_mean_state_of_each_specialists_rows(sources, data, tmp_path):
    export(pairs(sources), "mixtral", tmp_path / "out", data)
    model = load(tmp_path / "out")
    for k, name in enumerate(NAMES):
        own = AutoModelForCausalLM.from_pretrained(sources[name])
        ids = torch.tensor([json.loads(line)["input_ids"] for line in open(data[name]).readlines()[:3]])  # noqa: SIM115
        read = []
        own.model.layers[1].mlp.register_forward_pre_hook(lambda _, inputs, read=read: read.append(inputs[0]))
        with torch.no_grad():
            own(ids)
        mean = read[0].mean((0, 1))
        close(model.model.layers[1].mlp.gate.weight[k], mean / mean.norm())
    rows = held_out(
        [{"input_ids": ids[0].tolist()}, {"input_ids": ids[1, :35].tolist()}], tokenizer(), prompt_tokens=5
    )
    both = torch.cat([read_of(own, ids[:1]), read_of(own, ids[1:2, :35])], 1).mean((0, 1))
    # padding is left out
    close(router_rows(own, rows)[1], both / both.norm())


def read_of(model, ids):
    read = []
    hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return read[0]


def test_the_command_exports_a_fused_folder_and_says_what_it_loses(sources, data, tmp_path):
    UltraFuserForCausalLM.from_specialists(sources, gate="uniform").save_pretrained(tmp_path / "fused")
    AutoTokenizer.from_pretrained(sources["text"]).save_pretrained(tmp_path / "fused")
    options = [word for name, file in data.items() for word in ("--data", f"{name}={file}")]
    options += ["--to", "mixtral", "--out", tmp_path / "out", "--method", "ties:0.8", "--base", base_of(sources)]
    done = run("export", tmp_path / "fused", *options)
    assert done.exit_code == 0, done.output
    assert "It is not the fused model" in done.output
    [row] = [line for line in done.output.splitlines() if " code " in line and "│" in line]
    rows = [json.loads(line) for line in open(data["code"])][3:]  # noqa: SIM115
    held = held_out(rows, tokenizer(), prompt_tokens=32)
    fused = UltraFuserForCausalLM.from_pretrained(tmp_path / "fused")
    models = (fused.specialist("code"), fused, load(tmp_path / "out"))
    expected = [f"{mean_loss(model, held):.3f}" for model in models]
    assert [cell.strip() for cell in row.split("│") if cell.strip()][1:] == expected
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| code | {' | '.join(expected)} |" in card
    assert "attention, norms, embeddings and head are of `ties:0.8`" in card
    assert json.loads((tmp_path / "out" / "export.json").read_text())["experts"] == list(NAMES)
    compiled = compile(card.partition("```python\n")[2].partition("```")[0], "card", "exec")
    assert compiled


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def base_of(sources):
    return sources["text"].removesuffix("text") + "base"


def test_what_has_no_such_layout_is_refused_in_a_sentence(sources, data, tmp_path):
    given = [word for name, file in data.items() for word in ("--data", f"{name}={file}")]

    def refused(*options, what=None):
        done = run("export", *(what or pairs(sources)), "--out", tmp_path / "out", *options)
        assert done.exit_code == 2
        assert not (tmp_path / "out").exists()
        return " ".join(done.output.split())

    assert "Unknown layout 'gpt'" in refused("--to", "gpt", *given)
    assert "is of the family 'llama'. A qwen2_moe model has the layers of qwen2" in refused(
        "--to", "qwen2_moe", *given
    )
    assert "The donor is 'art'" in refused("--to", "mixtral", *given, "--donor", "art")
    assert "there are rows of ['code', 'math']" in refused("--to", "mixtral", *given[2:]).replace("There", "there")
    assert "no base was given" in refused("--to", "mixtral", *given, "--method", "ties")
    assert (
        "either"
        in refused(
            "--to", "mixtral", *given, "--method", "ties", "--base", base_of(sources), "--donor", "code"
        ).lower()
    )
    assert "Rows of an export make its routers" in refused("--to", "mixtral", *given, "--method", "regmean")
    biased = tmp_path / "biased"
    specialist(attention_bias=True).save_pretrained(biased)
    shutil.copy(f"{sources['text']}/tokenizer.json", biased)
    two = [f"a={biased}", f"b={biased}"]
    assert "'a' has `attention_bias`" in refused("--to", "mixtral", *given, what=two)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "is a LoRA adapter" in refused(
        "--to", "mixtral", *given, what=[*pairs(sources), f"lora={tmp_path / 'lora'}"]
    )
    other = tmp_path / "other"
    specialist(layers=3).save_pretrained(other)
    assert "`model.layers.2" in refused("--to", "mixtral", *given, what=[*pairs(sources), f"other={other}"])
