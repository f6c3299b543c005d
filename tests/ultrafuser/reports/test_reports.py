"""Who speaks, figures, and the data of the report, against the model itself and against what is drawn."""

import io
import itertools
import json
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from rich.console import Console
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import CHAT_TEMPLATE
from tests.support.report_rows import HARD, NAMES, TEXT, rows
from tests.support.stages import trainer
from tests.support.tiny import specialist, stir_gate, tokenizer
from trainers import GateTrainer
from ultrafuser.cli.app import app
from ultrafuser.pretrained import open_fused, prompt_ids
from ultrafuser.quickstart.toy_models import train_tokenizer
from ultrafuser.reports import charts
from ultrafuser.reports.colours import INK, PALETTE, PAPER, assign, blend, contrast, strength, text_on
from ultrafuser.reports.explanation import FUSED, explain, text_pieces
from ultrafuser.reports.page import verdict
from ultrafuser.reports.plots import draw_map, save, tsne
from ultrafuser.reports.report_folder import read_training
from ultrafuser.reports.terminal import print_tokens


@pytest.fixture(scope="module")
def byte_tokenizer():
    return train_tokenizer(["the value of <script> is"] * 3, vocab_size=300)


@pytest.fixture
def byte_model():
    """A fused model that reads bytes."""
    own = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "vocab_size": 300}
    model = UltraFuserForCausalLM.from_specialists({"a": specialist(**own), "b": specialist(layers=3, **own)})
    stir_gate(model)
    return model


# ---- explaining


def test_a_token_shows_the_weights_and_probabilities_of_the_position_before_it(fused):
    tokens = explain(fused, tokenizer(), TEXT, candidates=3)
    ids = tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    assert [token.id for token in tokens] == ids[0].tolist()
    with torch.no_grad():
        outputs = {FUSED: fused(ids), **{name: fused.specialist(name)(ids) for name in NAMES}}
    for place in range(1, len(tokens)):
        weights = outputs[FUSED].gate_weights[0, place - 1].tolist()
        assert tokens[place].weights == pytest.approx(dict(zip(NAMES, weights, strict=True)), abs=1e-6)
        assert tokens[place].leader == NAMES[int(np.argmax(weights))]
        for name, output in outputs.items():
            probabilities = output.logits[0, place - 1].softmax(-1)
            assert tokens[place].probabilities[name] == pytest.approx(probabilities[ids[0, place]].item(), rel=1e-4)
            spread = np.std(output.logits[0, place - 1].numpy())
            assert tokens[place].spreads[name] == pytest.approx(spread, rel=1e-4)
            best = probabilities.sort(descending=True)
            assert [c.text for c in tokens[place].candidates[name]] == [
                tokenizer().decode(i) for i in best.indices[:3]
            ]


def test_nobody_predicted_the_first_token(fused):
    first, *others = explain(fused, tokenizer(), TEXT)
    assert first.leader is None
    assert not first.weights
    assert not first.candidates
    assert all(token.leader in NAMES for token in others)


def test_a_continuation_is_what_generate_says_and_is_marked(fused):
    prompt = tokenizer()("2+2=", return_tensors="pt")["input_ids"]
    said = fused.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    tokens = explain(fused, tokenizer(), "2+2=", generate=6)
    assert [token.id for token in tokens] == said[0].tolist()
    assert [token.generated for token in tokens] == [False] * 4 + [True] * (len(tokens) - 4)


def test_a_chat_shows_question_and_answer_without_what_the_template_adds(fused):
    words = tokenizer(chat_template=CHAT_TEMPLATE)
    prompt = prompt_ids(words, [{"role": "user", "content": "2+2="}])
    said = fused.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    tokens = explain(fused, words, "2+2=", generate=6, chat=True)
    answer = [token for token in tokens if token.generated]
    assert [token.id for token in answer] == said[0, prompt.shape[-1] :].tolist()[: len(answer)]
    assert len(answer) >= 5
    assert "".join(token.text for token in tokens if not token.generated) == "2+2=\n"
    assert all(token.weights for token in answer)


def test_a_chat_without_a_template_is_the_continued_text(fused):
    same = explain(fused, tokenizer(), "2+2=", generate=4)
    assert explain(fused, tokenizer(), "2+2=", generate=4, chat=True) == same


def test_a_question_that_is_not_to_be_answered_is_refused(fused):
    with pytest.raises(ValueError, match="there to be answered"):
        explain(fused, tokenizer(), "2+2=", chat=True)


def test_the_command_refuses_a_question_that_is_not_to_be_answered_before_it_reads_a_model(tmp_path):
    refused = CliRunner().invoke(app, ["explain", str(tmp_path / "no model"), "2+2=", "--chat"])
    assert refused.exit_code == 2
    assert "Say how long it may be: --generate 40" in " ".join(refused.output.split())


def test_signed_weights_are_drawn_on_both_sides_of_0_without_a_warning():
    weights, colours = {"large": 1.0, "tuned": 0.5, "base": -0.5}, assign(["large", "tuned", "base"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (bars,) = charts.draw_gate_by_domain({"text": weights}, colours).axes
        bins = {"text": [list(weights.values())] * 2}
        (lines,) = charts.draw_gate_by_position(bins, list(weights), 16, colours).axes
    assert bars.get_xlim() == (-0.5, 1.5)
    # the others' begin where those before them end, or at 0
    assert [(bar.get_x(), bar.get_width()) for bar in bars.patches] == [(0, 1), (1, 0.5), (0, -0.5)]
    assert lines.get_ylim() == (-0.53, 1.03)


def test_pieces_join_to_the_text_and_a_part_of_a_character_adds_nothing(byte_tokenizer):
    ids = byte_tokenizer(HARD)["input_ids"]
    pieces = text_pieces(ids, byte_tokenizer)
    assert "".join(pieces) == HARD
    face = pieces.index("🙂")
    assert pieces[face - 3 : face] == ["", "", ""]


def test_an_incomplete_character_at_the_end_still_shows(byte_tokenizer):
    ids = byte_tokenizer("a🙂")["input_ids"][:-1]
    assert "".join(text_pieces(ids, byte_tokenizer)) == byte_tokenizer.decode(ids)


@pytest.mark.parametrize(("text", "says"), [("", "needs two tokens"), ("x", "needs two tokens"), ("x" * 300, "256")])
def test_a_text_too_short_or_too_long_is_refused(text, says, fused):
    with pytest.raises(ValueError, match=says):
        explain(fused, tokenizer(), text)


def test_a_model_that_is_not_fused_is_refused_before_it_is_loaded(tmp_path):
    specialist().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of type 'llama'"):
        open_fused(str(tmp_path))


def test_a_model_without_a_tokenizer_is_refused_before_it_is_loaded(fused, tmp_path):
    fused.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        open_fused(str(tmp_path))


# ---- in the terminal


def printed(tokens, **options):
    console = Console(file=io.StringIO(), **options)
    print_tokens(tokens, console)
    return console.file.getvalue()


def test_a_terminal_shows_the_text_in_colour_and_keeps_its_lines(byte_model, byte_tokenizer):
    tokens = explain(byte_model, byte_tokenizer, TEXT)
    options = {"force_terminal": True, "color_system": "truecolor", "width": 200, "highlight": False}
    coloured = printed(tokens, **options)
    assert "\x1b[38;2;" in coloured
    plain = printed(tokens, force_terminal=True, color_system=None)
    assert "\x1b" not in plain
    shown = Console(file=io.StringIO(), record=True, **options)
    print_tokens(tokens, shown)
    text = shown.export_text()
    assert text.startswith(TEXT.replace("\n", "⏎\n"))
    spreads = {name: np.mean([token.spreads[name] for token in tokens[1:]]) for name in ("a", "b")}
    assert f"Spread of logits: a {spreads['a']:.1f}, b {spreads['b']:.1f}." in text


def test_tokens_that_contrast_cuts_off_are_no_part_of_the_spread(byte_model, byte_tokenizer, tmp_path):
    byte_model.save_pretrained(tmp_path)
    model = UltraFuserForCausalLM.from_pretrained(tmp_path, fusion="contrast")
    tokens = explain(model, byte_tokenizer, TEXT)
    assert all(0 <= token.spreads[FUSED] < 100 for token in tokens[1:])
    with torch.no_grad():
        assert model(byte_tokenizer(TEXT, return_tensors="pt").input_ids).logits.isinf().any()


def test_without_colours_there_is_a_line_for_every_token(byte_model, byte_tokenizer):
    tokens = explain(byte_model, byte_tokenizer, TEXT)
    heading, *lines = printed(tokens).splitlines()
    assert heading.split()[:5] == ["token", "w(a)", "w(b)", "p(fused)", "p(a)"]
    assert len(lines) == len(tokens)
    assert f"{tokens[1].weights['a']:.3f}" in lines[1]


def test_the_command_prints_the_same_as_json(byte_model, byte_tokenizer, tmp_path):
    byte_model.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["explain", str(tmp_path), HARD, "--json"])
    assert result.exit_code == 0, result.output
    found, tokens = json.loads(result.stdout), explain(byte_model, byte_tokenizer, HARD)
    assert [token["text"] for token in found] == [token.text for token in tokens]
    assert found[5]["weights"] == pytest.approx(tokens[5].weights, abs=1e-6)


def test_a_wrong_folder_ends_with_a_sentence(tmp_path):
    result = CliRunner().invoke(app, ["explain", str(tmp_path / "nowhere"), "x"])
    assert result.exit_code == 2
    assert "There is no model at" in result.output


# ---- colours


def test_colours_read_on_both_papers_and_text_reads_on_them():
    for colour, paper in itertools.product(PALETTE, PAPER.values()):
        assert contrast(colour, paper) >= 3
    for colour, theme, weight in itertools.product(PALETTE, PAPER, np.linspace(0, 1, 11)):
        assert contrast(INK[theme], blend(colour, strength(weight, 3), PAPER[theme])) >= 4.5
    for colour, share in itertools.product(PALETTE, np.linspace(0, 1, 11)):
        background = blend(colour, share)
        assert contrast(text_on(background), background) >= 4.5


def test_contrast_is_that_of_the_guidelines():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    # the lightest grey that passes on white, by WCAG's own examples
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


# ---- figures


WEIGHTS = {
    "prose": dict(zip(NAMES, (0.7, 0.2, 0.1), strict=True)),
    "mixed": dict(zip(NAMES, (0.5, 0, 0.5), strict=True)),
}
LOG = [{"step": s, "loss": 3 - s / 10, "loss/text": 2 - s / 10} for s in range(5)] + [{"step": 5, "train_runtime": 1}]
COLOURS = assign([*NAMES, *WEIGHTS])
DRAWN = {
    "gate by domain": (charts.draw_gate_by_domain, WEIGHTS, COLOURS),
    "gate by position": (charts.draw_gate_by_position, {"prose": [[0.7, 0.2, 0.1]] * 4}, NAMES, 16, COLOURS),
    "entropy": (charts.draw_gate_entropy, {"prose": 0.2, "mixed": 0.9}, 3, COLOURS),
    "rows": (charts.draw_rows, rows(), COLOURS),
    "differences": (charts.draw_differences, rows(), COLOURS),
    "radar": (charts.draw_radar, rows(), COLOURS),
    "losses": (charts.draw_losses, {"stage-one": LOG}, COLOURS),
    "mixes": (charts.draw_mixes, {"run": [(0, [0.5, 0.5]), (3, [0.9, 0.1])]}, ["prose", "mixed"], 6, COLOURS),
    "map": (draw_map, np.random.default_rng(0).normal(size=(40, 2)), NAMES * 13 + ["text"], ["topic"] * 40),
}


@pytest.mark.grid
@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_is_saved_for_light_and_dark_and_leaves_the_library_as_it_was(name, tmp_path):
    before = dict(matplotlib.rcParams)
    inline = save(tmp_path / "figure", *DRAWN[name])
    assert {file.name for file in tmp_path.iterdir()} == {"figure.svg", "figure.light.png", "figure.dark.png"}
    assert dict(matplotlib.rcParams) == before
    # its ink and paper are those of the page, and its names are its own
    assert "currentColor" in inline
    assert not [colour for colour in (INK["light"], PAPER["light"], "<style", "<g id=") if colour in inline]
    assert "prefers-color-scheme: dark" in (tmp_path / "figure.svg").read_text()
    assert save(tmp_path / "again", *DRAWN[name]) == inline


def test_names_are_written_as_they_are_and_escaped(tmp_path):
    inline = save(tmp_path / "figure", *DRAWN["differences"])
    assert "costs $5 &amp; &lt;b&gt;" in inline


def bars(axis):
    """Widths of the bars drawn, in order."""
    return [patch.get_width() for patch in axis.patches if isinstance(patch, Rectangle)]


def test_bars_are_as_long_as_the_numbers():
    mean, *by_domain = charts.draw_rows(rows(), COLOURS).axes
    assert bars(mean) == pytest.approx([row["mean"] for row in rows()])
    for axis, domain in zip(by_domain, NAMES, strict=True):
        assert bars(axis) == pytest.approx([row["loss"][domain] for row in rows()])
    (axis,) = charts.draw_gate_by_domain(WEIGHTS, COLOURS).axes
    assert bars(axis) == pytest.approx([WEIGHTS[domain][name] for name in NAMES for domain in WEIGHTS])


def test_differences_leave_the_fused_model_out_and_stand_where_they_are():
    (axis,) = charts.draw_differences(rows(), COLOURS).axes
    points = [line.get_xydata()[0].tolist() for line in axis.lines if line.get_marker() == "o"]
    assert points == [[1, 0], [2, 1], [3, 2], [4, 3]]
    assert [label.get_text() for label in axis.get_yticklabels()] == [row["name"] for row in rows()[1:]]


def test_the_best_row_lies_on_the_outer_ring_of_the_radar_and_worse_ones_inside():
    (axis,) = charts.draw_radar(rows(), COLOURS).axes
    radii = {line.get_label(): line.get_ydata() for line in axis.lines}
    assert radii["fused"] == pytest.approx([1, 1, 1, 1])
    assert radii["code specialist"] == pytest.approx([np.exp(-2)] * 4)


def test_a_drawn_text_has_every_token_in_its_colour_and_every_line_in_its_place(byte_model, byte_tokenizer):
    tokens = explain(byte_model, byte_tokenizer, "ab cd\n\n  efgh")
    (axis,) = charts.draw_tokens(tokens, {"a": "#ff0000", "b": "#0000ff"}, columns=4).axes
    lines = {}
    for text in axis.texts:
        column, height = text.get_position()
        row = lines.setdefault(int(height), [" "] * 6)
        row[int(column) : int(column) + len(text.get_text())] = text.get_text()
    assert {number: "".join(row).rstrip() for number, row in lines.items()} == {0: "ab c", 1: "d", 3: "  ef", 4: "gh"}
    drawn = [patch.get_facecolor()[:3] for patch in axis.patches[1::2]]
    speaking = [token for token in tokens[1:] if token.text.strip("\n")]
    assert drawn == [(1, 0, 0) if token.leader == "a" else (0, 0, 1) for token in speaking]


def test_a_radar_of_two_domains_is_refused():
    flat = [{**row, "loss": {d: row["loss"][d] for d in NAMES[:2]}} for row in rows()]
    with pytest.raises(ValueError, match="three axes"):
        charts.draw_radar(flat, COLOURS)


def test_one_colour_means_one_name_in_every_figure():
    position = charts.draw_gate_by_position({"prose": [[0.7, 0.2, 0.1]]}, NAMES, 16, COLOURS).axes[0]
    losses = charts.draw_losses({"run": LOG}, COLOURS).axes[0]
    drawn = {(line.get_label(), line.get_color()) for axis in (position, losses) for line in axis.lines}
    assert drawn - {("all", matplotlib.rcParams["text.color"])} == {(name, COLOURS[name]) for name in NAMES}


def test_a_map_puts_texts_of_the_same_words_side_by_side():
    words = {"text": "river mountain cloud forest", "code": "return import lambda yield"}
    rng = np.random.default_rng(0)
    domains = [name for name in words for _ in range(20)]
    texts = [" ".join(rng.choice(words[domain].split(), size=12)) for domain in domains]
    points = tsne(texts)
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert [domains[i] for i in distances.argmin(1)] == domains
    assert np.array_equal(points, tsne(texts))
    with pytest.raises(ValueError, match="at least 5"):
        tsne(texts[:4])


# ---- the report's data


@pytest.mark.parametrize(
    ("interval", "says"),
    [([-0.2, -0.1], "ahead"), ([0.1, 0.2], "behind"), ([-0.1, 0.1], "too close to tell"), (None, "–")],
)
def test_a_row_is_ahead_or_behind_only_if_its_interval_says_so(interval, says):
    assert (
        verdict({"name": "merge: ties", "kind": "merge", "difference": 0.0, "difference_interval": interval}) == says
    )


def test_curves_are_read_from_a_stage_s_own_checkpoint(fused, tmp_path):
    stage = trainer(GateTrainer, fused, tmp_path / "stage-one", max_steps=2, save_strategy="steps", save_steps=2)
    stage.train()
    run = read_training([tmp_path / "stage-one" / "checkpoint-2"])["stage-one"]
    assert run["steps"] == 2
    assert run["mixes"] == [[step, list(mix)] for step, mix in stage.sampler.mixes]
    axis = charts.draw_losses({"stage-one": run["log"]}, assign(run["domains"])).axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in axis.lines}
    assert list(drawn["all"]) == [entry["loss"] for entry in run["log"] if "loss" in entry]
    with pytest.raises(ValueError, match="trainer_state.json"):
        read_training([tmp_path])
