"""The report's page in a real browser, opened from a file."""

import json
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.browsers import in_browser
from tests.support.report_rows import HARD, rows
from tests.support.tiny import specialist, stir_gate
from ultrafuser.cli.app import app
from ultrafuser.pretrained import open_fused
from ultrafuser.quickstart.toy_models import train_tokenizer
from ultrafuser.reports.explanation import explain
from ultrafuser.reports.report_folder import report


NASTY = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
TEXTS = {NASTY: f"{NASTY}\n</script>{HARD}", "Plain": "The value of a & b is\n\n  2 < 3."}
NAMES = ["a", "b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A fused model of two specialists that reads bytes."""
    folder = tmp_path_factory.mktemp("fused")
    own = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "vocab_size": 300}
    model = UltraFuserForCausalLM.from_specialists({"a": specialist(**own), "b": specialist(layers=3, **own)})
    stir_gate(model)
    model.save_pretrained(folder)
    train_tokenizer(["the value of <script> is </script>"] * 3, vocab_size=300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results():
    """Results of many rows with names that attack the page, and with the gate's statistics."""
    many = rows(("fused", NASTY, "a specialist", *(f"baseline {number}" for number in range(20))))
    domains = list(many[0]["loss"])
    gate = {
        "mean_weights": {domain: {"a": 0.7, "b": 0.3} for domain in domains},
        "weights_by_position": {domain: [[0.7, 0.3], [0.6, 0.4]] for domain in domains},
        "bin_tokens": 16,
        "entropy": dict.fromkeys(domains, 0.5),
    }
    facts = {"seed": 0, "machine": NASTY, "config": {NASTY: NASTY}, "left_out": {NASTY: NASTY}}
    return {"domains": domains, "specialists": NAMES, "rows": many, "gate": gate, **facts}


@pytest.fixture(scope="module")
def file(folder, results, tmp_path_factory):
    return report(tmp_path_factory.mktemp("report"), results=results, fused=open_fused(str(folder)), examples=TEXTS)


@contextmanager
def opened(browser, file, *, width=1280, scheme="light"):
    """The page, which must neither complain nor ask for anything but itself."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, complaints, requests = context.new_page(), [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    yield page
    assert complaints == []
    assert requests == [file.as_uri()]
    context.close()


def shown(page):
    """What is shown about a token: specialist to (weight, probability)."""
    cells = page.locator("#details tr").all()
    found = [line.locator("td").all_inner_texts() for line in cells]
    return {name: (weight, probability) for name, weight, probability, _ in filter(None, found)}


@pytest.mark.e2e
@in_browser
def test_pointing_at_a_token_shows_the_model_s_weights(browser, file, folder):
    tokens = explain(*open_fused(str(folder)), TEXTS["Plain"])
    with opened(browser, file) as page:
        spans = page.locator(".text").nth(1).locator("> span")
        assert spans.count() == len(tokens)
        for place in (1, 7, len(tokens) - 1):
            spans.nth(place).hover()
            assert page.locator("#details").is_visible()
            for name in NAMES:
                expected = f"{tokens[place].weights[name]:.3f}", f"{tokens[place].probabilities[name]:.3f}"
                assert shown(page)[name] == expected
        likeliest = [c for name in ("fused", *NAMES) for c in tokens[-1].candidates[name]]
        found = page.locator("#details td span span").all_inner_texts()
        assert [text.split()[-1] for text in found] == [f"{c.probability:.2f}" for c in likeliest]
        page.mouse.move(0, 0)
        assert not page.locator("#details").is_visible()


@pytest.mark.e2e
@in_browser
def test_the_keyboard_reaches_every_token_and_escape_closes(browser, file, folder):
    tokens = explain(*open_fused(str(folder)), TEXTS["Plain"])
    with opened(browser, file) as page:
        page.locator(".text").nth(1).locator("> span").first.focus()
        assert "nobody predicted it" in page.locator("#details").inner_text()
        for place in (1, 2):
            page.keyboard.press("ArrowRight")
            assert shown(page)["a"][0] == f"{tokens[place].weights['a']:.3f}"
        page.keyboard.press("End")
        assert shown(page)["b"][0] == f"{tokens[-1].weights['b']:.3f}"
        page.keyboard.press("Escape")
        assert not page.locator("#details").is_visible()


@pytest.mark.e2e
@in_browser
def test_text_from_outside_is_shown_and_does_nothing(browser, file):
    with opened(browser, file) as page:
        assert page.title() == "Fused from a and b"
        assert page.locator("body script").count() == 2
        assert page.locator("img").count() == 0
        text = page.locator(".text").first
        for place in range(12):
            text.locator("> span").nth(place).hover()
        written = text.evaluate("""
            node => { node.querySelectorAll("i").forEach(sign => sign.remove()); return node.textContent }
        """)
        assert written == TEXTS[NASTY]
        assert page.title() == "Fused from a and b"


@pytest.mark.e2e
@in_browser
@pytest.mark.parametrize(("scheme", "other"), [("light", "dark"), ("dark", "light")])
def test_the_page_follows_the_reader_s_theme_until_the_button_changes_it(scheme, other, browser, file):
    papers = {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}
    paper = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('figure text')).fill === getComputedStyle(document.body).color"
    with opened(browser, file, scheme=scheme) as page:
        assert page.evaluate(paper) == papers[scheme]
        assert page.evaluate(ink)
        page.locator("#theme").click()
        assert page.evaluate(paper) == papers[other]
        assert page.evaluate(ink)
        page.locator("#theme").click()
        assert page.evaluate(paper) == papers[scheme]


@pytest.mark.e2e
@in_browser
@pytest.mark.parametrize(("scheme", "paper", "ink"), [("light", 255, 31), ("dark", 13, 230)])
def test_a_picture_by_itself_follows_the_reader_s_theme(scheme, paper, ink, browser, file):
    with opened(browser, file.with_name("rows.svg"), scheme=scheme) as page:
        assert f"rgb({paper}, " in page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert f"rgb({ink}, " in page.evaluate("getComputedStyle(document.querySelector('text')).fill")


@pytest.mark.e2e
@in_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_overflows_the_page(width, browser, file):
    with opened(browser, file, width=width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        spans = page.locator(".text").first.locator("> span")
        spans.nth(spans.count() - 1).hover()
        box = page.locator("#details").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width


@pytest.mark.e2e
@in_browser
def test_what_beats_the_fused_model_stands_above_it(browser, folder, results, tmp_path):
    few = results["rows"][:3]
    better = {**few[1], "name": "better", "mean": few[0]["mean"] - 1, "difference": -1.0}
    changed = {**results, "rows": [*few, better | {"difference_interval": [-1.1, -0.9]}], "gate": {}}
    with opened(browser, report(tmp_path, results=changed)) as page:
        lines = page.locator("#losses tbody tr").all()
        assert len(lines) == len(changed["rows"])
        assert [line.locator("th").inner_text().splitlines()[0] for line in lines[:2]] == ["better", "fused"]
        assert "-1.000\n[-1.100, -0.900]" in lines[0].inner_text()
        assert lines[0].inner_text().endswith("ahead")


@pytest.mark.e2e
def test_missing_fields_leave_gaps_and_not_a_crash(tmp_path):
    bare = [{"name": "fused", "kind": "fused", "loss": {"x": 1.0}, "mean": 1.0}]
    bare += [{"name": "other", "kind": "odd", "loss": {"x": 2.0, "y": 3.0}, "mean": 2.0}]
    page = report(tmp_path, results={"specialists": list("abcdef"), "rows": bare}).read_text()
    assert "–" in page
    assert {file.name for file in tmp_path.glob("*.svg")} == {"rows.svg"}


@pytest.mark.e2e
def test_results_of_other_specialists_are_refused(folder, results, tmp_path):
    weights = results["gate"]["mean_weights"]
    means = {domain: dict(zip("xy", own.values(), strict=True)) for domain, own in weights.items()}
    others = {**results, "specialists": ["x", "y"], "gate": {**results["gate"], "mean_weights": means}}
    (tmp_path / "results.json").write_text(json.dumps(others))
    command = ["report", str(tmp_path / "results.json"), "--model", str(folder), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "must belong together" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_model_alone_has_its_gate_measured(folder, tmp_path):
    result = CliRunner().invoke(app, ["report", "--model", str(folder), "--out", str(tmp_path), "--text", "one two"])
    assert result.exit_code == 0, result.output
    drawn = {file.stem for file in tmp_path.glob("*.svg")}
    assert drawn == {"gate_by_domain", "gate_by_position", "gate_entropy", "text_0"}
    assert "held-out text of ultrafuser.quickstart.corpora, seed 0" in (tmp_path / "index.html").read_text()
