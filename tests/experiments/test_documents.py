import json
import re

import pytest

from experiments.averages import files
from experiments.paper_tables import PAPER_TUNED
from experiments.tables import DOCUMENTS, ROOT, TABLES, with_tables
from ultrafuser.reports.marked_tables import MARKED


@pytest.fixture(params=DOCUMENTS)
def text(request):
    return (ROOT / request.param).read_text()


def test_tables_are_those_of_the_result_files(text):
    assert with_tables(text) == text


def test_every_marker_is_followed_by_its_table_and_an_end(text):
    assert len(MARKED.findall(text)) == text.count("<!-- results/") == text.count("<!-- end -->")


def test_no_table_of_measured_numbers_stands_outside_the_markers(text):
    written = [line for line in MARKED.sub("", text).splitlines() if line.startswith("|")]
    assert not [line for line in written if len(re.findall(r"\| -?\d+\.\d+ ", line)) > 1]


def test_a_changed_number_is_told_from_the_result_files():
    text = (ROOT / "MODEL_CARD.md").read_text()
    assert with_tables(text.replace("4.613", "4.612")) == text != text.replace("4.613", "4.612")


@pytest.mark.parametrize(
    ("marker", "said"),
    [("results/nowhere.json: losses", "nowhere.json"), ("results/quickstart.json: loses", "no table 'loses'")],
)
def test_a_marker_that_names_nothing_is_an_error(marker, said):
    with pytest.raises(ValueError, match=said):
        with_tables(f"<!-- {marker} -->\n\n<!-- end -->\n")


def test_comparisons_read_what_the_evaluation_writes_as_they_read_the_quickstarts_file(tmp_path):
    quickstart = ROOT / "results" / "quickstart.json"
    found = files(quickstart)[0]
    domains = ["text", "code", "math"]
    losses = found["nats_per_token"].items()
    weights = {d: dict(zip(domains, w, strict=True)) for d, w in found["mean_gate_weights"].items()}
    written = {
        "rows": [{"name": name, "loss": {**row, "mixed": 9.0}} for name, row in losses],
        "gate": {"mean_weights": {**weights, "mixed": dict.fromkeys(domains, 1 / 3)}},
    }
    (tmp_path / "results.json").write_text(json.dumps(written))
    for name in ("losses", "losses beside the paper's", "gate weights beside the paper's"):
        assert TABLES[name](tmp_path / "results.json") == TABLES[name](quickstart)


def test_a_pattern_shows_the_mean_over_the_files_of_all_seeds(tmp_path):
    for seed, more in ((0, 0.0), (1, 1.0)):
        rows = [{"name": n, "loss": dict.fromkeys(("text", "code", "math"), 2.0 + more)} for n in PAPER_TUNED]
        (tmp_path / f"one_base-{seed}.json").write_text(json.dumps({"rows": rows}))
    found = TABLES["tuned further beside the paper's"](tmp_path / "one_base-*.json")
    assert "| text specialist | 35.46 | 2.500 |" in found.splitlines()
    assert len(found.splitlines()) == 2 + len(PAPER_TUNED)


def test_a_comparison_is_sorted_by_the_mean_and_averages_seeds(tmp_path):
    domains = ("text", "code", "math")
    cost = {"parameters": 2.5e6, "parameters_per_token": 2.4e6, "bytes": 1e7, "cache_bytes_per_token": 2048}
    for seed in (0, 1):
        rows = [
            {
                "name": name,
                "loss": dict.fromkeys((*domains, "mixed"), loss + seed),
                "mean": loss + seed,
                "difference": loss - 3.0,
                "difference_interval": [loss - 3.1 - seed, loss - 2.9],
                "retention": 0.5 + seed / 10,
                "positive_flips": 0.01,
                "negative_flips": 0.02,
                "calibration_error": dict.fromkeys(domains, 0.03),
                "cost": {**cost, "speed": 1.0 + seed},
            }
            for name, loss in (("fused", 3.0), ("router", 4.0), ("one model", 2.0))
        ]
        (tmp_path / f"x-{seed}.json").write_text(json.dumps({"rows": rows}))
    quality, price = (t.splitlines()[2:] for t in TABLES["comparison"](tmp_path / "x-*.json").split("\n\n"))
    for lines in (quality, price):
        assert [line.split(" | ")[0] for line in lines] == ["| one model", "| fused", "| router"]
    assert quality[0].endswith("2.500 | 2.500 ± 0.707 | -1.000 ± 0.000 | -2.100 to -0.900 |")
    assert price[0] == "| one model | 55.0% | 1.0% | 2.0% | 0.030 | 2.50 | 2.40 | 10.00 | 2.0 | 1.50 |"


ORACLE = "best specialist per domain (oracle)"


@pytest.fixture
def compared(tmp_path):
    """Result files of two seeds: one gate is ahead of the oracle in 5 of 6 cells, the other in none."""

    def told(text, code, math):
        return {
            "difference": {"text": text, "code": code, "math": math, "mixed": -2.0},
            "interval": [-0.5, 0.1 + text],
        }

    for seed, text in ((0, -0.1), (1, 0.05)):
        rows = {"behind": told(0.3, 0.0, 0.3), "good": told(text, -0.2, -0.4)}
        references = (ORACLE, f"{ORACLE}, a temperature per token", "router: prompt perplexity")
        against = {reference: {**rows, reference: told(0.0, 0.0, 0.0)} for reference in references}
        (tmp_path / f"x-{seed}.json").write_text(json.dumps({"against": against}))
    return tmp_path / "x-*.json"


def test_cells_show_every_seed_of_every_domain_and_leave_the_reference_out(compared):
    good, behind = TABLES["cells"](compared).splitlines()[2:]
    assert good == "| good | -0.100 +0.050 | -0.200 -0.200 | -0.400 -0.400 | -2.000 |"
    assert behind.startswith("| behind | +0.300 +0.300 | +0.000 +0.000 |")


def test_cells_ahead_are_counted_over_all_files_and_a_tie_is_not_ahead(compared):
    good, behind = TABLES["ahead"](compared).splitlines()[2:]
    counted = "5 of 6, +0.050, -0.208 [-0.500, +0.150]"
    assert good == f"| good | {counted} | {counted} | {counted} |"
    assert behind.startswith("| behind | 0 of 6, +0.300, +0.200 ")


def test_the_headline_shows_what_is_ahead_of_the_fused_model_and_counts_cells_ahead_of_the_oracle(tmp_path):
    rows = []
    for name, text, mixed in (("fused", 3.0, 4.0), (ORACLE, 2.5, 6.0), ("better", 1.9, 3.0), ("worse", 9.0, 9.0)):
        loss = {"text": text, "code": 2.0, "math": 1.0, "mixed": mixed}
        cost = {"parameters_per_token": 3 if name == "fused" else 1}
        rows.append({"name": name, "loss": loss, "mean": (text + 3.0) / 3, "cost": cost})
    rows.append(rows[-1] | {"name": "text specialist"})
    (tmp_path / "x-0.json").write_text(json.dumps({"rows": rows}))
    assert TABLES["headline"](tmp_path / "x-*.json").splitlines()[2:] == [
        "| better | 1.633 | -0.200 | 1 of 3 | 3.000 | 1.0 |",
        f"| {ORACLE} | 1.833 | +0.000 |  | 6.000 | 1.0 |",
        "| fused | 2.000 | +0.167 | 0 of 3 | 4.000 | 3.0 |",
    ]
