"""The card of a fused folder: metadata that the Hub reads, licences told apart, results in words, nothing overwritten."""

import json
import re

import pytest
from huggingface_hub import ModelCard, metadata_load
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.comparisons import COMPARISON, JUDGEMENT, NAMES
from tests.support.tiny import specialist
from ultrafuser.cli.app import app
from ultrafuser.hub.model_card import write_card


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "fused"
    models = {name: specialist(layers=1, hidden_size=16) for name in NAMES}
    UltraFuserForCausalLM.from_specialists(models).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved):
    for file in ("README.md", "specialists.json"):
        (saved / file).unlink(missing_ok=True)
    return saved


def stating(path, metadata):
    """The folder of a specialist whose card says so."""
    path.mkdir(parents=True)
    (path / "README.md").write_text(f"---\n{metadata}\n---\nA model.\n")
    return str(path)


@pytest.fixture
def permissive(tmp_path):
    return {name: stating(tmp_path / name, "license: mit") for name in NAMES}


def written(tmp_path, name, results):
    (tmp_path / name).write_text(json.dumps(results))
    return tmp_path / name


def test_metadata_comes_back_as_it_was_meant(folder, permissive, tmp_path):
    files = [written(tmp_path, "a.json", COMPARISON), written(tmp_path, "b.json", JUDGEMENT)]
    assert write_card(folder, results=files, specialists=permissive, data=["me/data", "Old books"]) == []
    raw = metadata_load(folder / "README.md")
    assert (raw["license"], raw["datasets"], raw["library_name"]) == ("mit", ["me/data"], "transformers")
    assert "base_model" not in raw
    data = ModelCard.load(folder / "README.md").data
    assert data.model_name == "fused"
    found = {(r.dataset_type, r.dataset_config, r.metric_type): r.metric_value for r in data.eval_results}
    assert found["held-out", "text", "nats_per_token"] == 3.0
    assert found["held-out", "mixed", "nats_per_token"] == 9.0
    assert found["held-out", "math", "accuracy"] == 0.5
    assert found["tatsu-lab/alpaca_eval", None, "win_rate"] == 0.625
    assert len(found) == 4 + 3 + 3 + 1
    # no two of one metric in one entry: the Hub would show one of them
    for entry in raw["model-index"][0]["results"]:
        kinds = [metric["type"] for metric in entry["metrics"]]
        assert len(kinds) == len(set(kinds))
    assert next(r for r in data.eval_results if r.metric_type == "win_rate").dataset_revision == "a" * 40


def test_the_text_loads_the_model_and_says_who_is_better(folder, permissive, tmp_path):
    files = [written(tmp_path, "a.json", COMPARISON), written(tmp_path, "b.json", JUDGEMENT)]
    write_card(folder, results=files, specialists=permissive, repo="me/three")
    text = (folder / "README.md").read_text()
    assert 'model = AutoModelForCausalLM.from_pretrained("me/three", trust_remote_code=True)' in text
    assert "`vllm serve me/three --trust-remote-code`" in text
    table = [line.split("|")[1].strip(" *") for line in text.splitlines() if re.match(r"\|.* to .*\|$", line)]
    assert table == ["one model", "lucky router", "fused", "math specialist"]
    assert "*one model* beats the fused model by 1.000 nats per token (95 % interval 0.900 to 1.100)." in text
    assert "by 0.010 nats per token (95 % interval -0.010 to 0.030; this may be chance" in text
    assert "math specialist* beats" not in text
    assert "| text | 0.70 | 0.20 | 0.10 | 0.80 |" in text
    assert "Measured with seed 0, commit abc1234, torch 2.0." in text
    assert "a-judge preferred this model's answers in 62.5 % of the questions (95 % interval 50.00 to 75.00)" in text
    assert "2 had no verdict" in text
    assert "All specialists state one permissive licence: mit." in text


def test_the_loading_lines_load(folder, permissive, monkeypatch):
    write_card(folder, specialists=permissive)
    line = re.search(r"^model = (.*)$", (folder / "README.md").read_text(), re.MULTILINE)[1]
    monkeypatch.chdir(folder.parent)
    from transformers import AutoModelForCausalLM

    assert eval(line, {"AutoModelForCausalLM": AutoModelForCausalLM}).config.specialist_names == NAMES


def test_what_vllm_would_serve_wrongly_is_not_offered_to_it(tmp_path):
    models = {name: specialist(layers=1, hidden_size=16) for name in NAMES}
    UltraFuserForCausalLM.from_specialists(models, fusion="probabilities").save_pretrained(tmp_path / "mixture")
    write_card(tmp_path / "mixture")
    text = (tmp_path / "mixture" / "README.md").read_text()
    assert "Not with vLLM." in text
    assert "vllm serve" not in text
    assert "Fusion of probabilities." in text


@pytest.mark.parametrize(
    ("metadata", "warning", "licence"),
    [
        ("license: cc-by-nc-4.0", "`code`, cc-by-nc-4.0, allows no commercial use", "other"),
        ("license: other\nlicense_name: qwen-research", "`code`, qwen-research, allows no commercial use", "other"),
        ("license: other", "`code`, other, has terms of its own", "other"),
        ("license: llama3.1", "`code`, llama3.1, has terms of its own", "other"),
        ("license: gemma", "`code`, gemma, has terms of its own", "other"),
        ("license: cc-by-sa-4.0", "`code`, cc-by-sa-4.0, asks that what is made of it is shared", "other"),
        ("license: gpl-3.0", "`code`, gpl-3.0, asks that what is made of it is shared", "other"),
        ("license: cc-by-nd-4.0", "`code`, cc-by-nd-4.0, allows no derived works", "other"),
        ("license: cc-by-nc-nd-4.0", "neither does the whole then; it allows no derived works", "other"),
        ("license: my-own", "`code`, my-own, is none that is known here to be permissive", "other"),
        ("license: apache-2.0", "licences differ: mit (`text`), apache-2.0 (`code`), mit (`math`)", "other"),
        ("tags: [a]", "`code` is unknown: its card states no licence", "unknown"),
        ("license: [", "`code` is unknown: the metadata of its card is malformed", "unknown"),
    ],
)
def test_licences_that_bind_the_whole_are_warned_about(metadata, warning, licence, folder, permissive, tmp_path):
    sources = {**permissive, "code": stating(tmp_path / "odd", metadata)}
    warnings = write_card(folder, specialists=sources)
    assert any(warning in w for w in warnings), warnings
    text = (folder / "README.md").read_text()
    assert all(w in text for w in warnings)
    assert metadata_load(folder / "README.md")["license"] == licence
    assert not [w for w in warnings if "`text` is" in w or "licence of `text`" in w]


def test_one_licence_with_terms_of_its_own_stays_that_licence_and_is_warned_about(folder, tmp_path):
    terms = "license: other\nlicense_name: house\nlicense_link: https://example.com/terms"
    warnings = write_card(folder, specialists={name: stating(tmp_path / name, terms) for name in NAMES})
    assert len(warnings) == 3
    raw = metadata_load(folder / "README.md")
    assert [raw[k] for k in ("license", "license_name", "license_link")] == [
        "other",
        "house",
        "https://example.com/terms",
    ]


def test_cards_of_the_hub_are_read_from_the_cache_and_become_base_models(folder, permissive, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--them--coder"
    stating(cached / "snapshots" / ("c" * 40), "license: mit")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("c" * 40)
    warnings = write_card(folder, specialists={**permissive, "code": "them/coder", "math": "them/absent"})
    assert len(warnings) == 1
    assert "`math` is unknown: its card could not be read from the Hub" in warnings[0]
    raw = metadata_load(folder / "README.md")
    assert raw["base_model"] == ["them/coder", "them/absent"]
    assert raw["base_model_relation"] == "merge"
    assert "[them/coder](https://huggingface.co/them/coder)" in (folder / "README.md").read_text()


def test_a_card_of_someone_elses_is_not_replaced_unasked(folder, permissive):
    path = folder / "README.md"
    path.write_text("# Mine\n")
    with pytest.raises(FileExistsError, match="another's work. Move it away, or use --overwrite"):
        write_card(folder, specialists=permissive)
    assert path.read_text() == "# Mine\n"
    write_card(folder, specialists=permissive, overwrite=True)
    write_card(folder, specialists=permissive, repo="me/renamed")
    ours = path.read_text()
    assert "me/renamed" in ours
    # a letter changed by hand is someone's work
    path.write_text(ours.replace("None yet.", "Soon."))
    with pytest.raises(FileExistsError):
        write_card(folder, specialists=permissive)


def test_what_does_not_fit_the_folder_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"are \['text', 'code', 'math'\], but got \['maths'\]"):
        write_card(folder, specialists={"maths": "a/b"})
    with pytest.raises(ValueError, match="a folder or an id such as 'owner/model', but that of 'math' is 'nowhere'"):
        write_card(folder, specialists={"math": "nowhere"})
    with pytest.raises(ValueError, match=r"odd.json' holds \['loss'\]"):
        write_card(folder, results=[written(tmp_path, "odd.json", {"loss": 1})])
    other = {**COMPARISON, "specialists": ["a", "b"], "gate": None}
    with pytest.raises(ValueError, match=r"those in '.*other.json' are of \['a', 'b'\]"):
        write_card(folder, results=[written(tmp_path, "other.json", other)])
    with pytest.raises(ValueError, match="holds no config.json"):
        write_card(tmp_path)
    specialist(layers=1, hidden_size=16).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="holds a model of type 'llama'"):
        write_card(tmp_path / "llama")
    assert not (folder / "README.md").exists()


ODD = "\x1b[31mred\x1b]0;x\x07<script>"


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"licence": "mit"},
        {"source": None, "commit": None},
        {"source": "a/b\nlicense: mit", "commit": "c"},
        {"source": ODD, "commit": ODD, "licence": ODD, "terms": ODD, "link": ODD, "problem": ODD},
    ],
    ids=str,
)
def test_whatever_a_folder_says_of_its_specialists_is_words_in_the_card(record, folder):
    (folder / "specialists.json").write_text(json.dumps({"text": record}))
    done = CliRunner().invoke(app, ["card", str(folder)])
    assert done.exit_code == 0, done.exception
    card = (folder / "README.md").read_text()
    assert "\x1b" not in card
    assert "<script" not in card
    assert "\nlicense: mit" not in card


def test_whatever_results_say_of_their_making_is_words_in_the_card(folder, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({**COMPARISON, "machine": ODD, "commit": ODD}))
    write_card(folder, results=[tmp_path / "results.json"])
    assert "\x1b" not in (folder / "README.md").read_text()
    assert "<script" not in (folder / "README.md").read_text()


def test_the_command_writes_the_card_and_says_warnings(folder, permissive):
    options = [f"--specialists={name}={source}" for name, source in permissive.items()]
    shown = CliRunner().invoke(app, ["card", str(folder), *options[:2]])
    assert shown.exit_code == 0, shown.output
    assert "Warning: The licence of `math` is unknown: nobody said which model it is." in shown.output
    assert (folder / "README.md").exists()
    (folder / "README.md").write_text("# Mine\n")
    shown = CliRunner().invoke(app, ["card", str(folder), *options])
    assert shown.exit_code == 2
    assert "another's work" in shown.output
