"""The documentation: everything in it runs, what it quotes is there, and the site needs no network."""

import ast
import json
import re
import socket
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import typer
import yaml

import modeling_ultrafuser
import trainers
from experiments.tables import with_tables
from modeling_ultrafuser.fusions_ultrafuser import FUSIONS
from modeling_ultrafuser.gates_ultrafuser import GATES
from modeling_ultrafuser.sparsifiers_ultrafuser import SPARSIFIERS
from tests.support.pages import NOT_RUN, ROOT, blocks, parse
from trainers.mix.mix_config import MIXES, POLICIES, REWARDS, SAMPLERS, MixConfig
from ultrafuser.decoding.choosing import WAYS
from ultrafuser.export import LAYOUTS
from ultrafuser.merge import MERGES
from ultrafuser.route import ROUTERS


DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md"]
SOURCES = ("modeling_ultrafuser", "trainers", "ultrafuser")


# ------------------------------------------------------------------------------------------------ commands and code


def read(*options):
    """What became of every command and block, by page."""
    command = [sys.executable, "-m", "tests.support.pages", *options, *map(str, PAGES)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {page.name: [] for page in PAGES}
    for event in map(json.loads, done.stdout.splitlines()):
        found[event["page"]].append(event)
    return found


@pytest.fixture(scope="module")
def events():
    return read()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_code_of_a_page_run_one_after_the_other(page, events):
    errors = [event["error"] for event in events[page.name] if "error" in event]
    assert not errors, errors[0]
    reached = {event["line"] for event in events[page.name]}
    assert reached == {block.line for block in blocks(page)}


def test_few_are_not_run_and_each_for_a_reason(events, capsys):
    every = [event for page in events.values() for event in page]
    left = [event for event in every if event["done"] != "run"]
    with capsys.disabled():
        for event in left:
            print(f"\n{event['page']}:{event['line']} {event['why']}: {event['what'][:60]!r}", end="")
    never = [event for event in left if event["done"] == "parsed"]
    assert {event["why"] for event in never} <= set(NOT_RUN.values())
    assert len(every) > 3 * len(never)


@pytest.mark.slow
def test_what_takes_long_runs_too():
    events = read("--slow")
    assert not [event["error"] for page in events.values() for event in page if "error" in event]
    assert not [event for page in events.values() for event in page if event.get("done") == "slow"]


@pytest.mark.parametrize(
    "line",
    [
        "ultrafuser quickstart --sed 0",
        "ultrafuser data plush kept.jsonl me/set",
        "pip install -e .[evil]",
        "vllm serve fused --trust-local-code",
        "accelerate launch --config_fill fsdp2.yaml train.py",
    ],
)
def test_what_is_not_there_is_told_even_of_commands_that_are_not_run(line):
    wrong_use = typer.BadParameter.__base__
    with pytest.raises((wrong_use, AssertionError, KeyError, SystemExit)):
        parse(line.split())


# ----------------------------------------------------------------------------------------------- what pages quote


def templates():
    """Every text in the sources, with a NUL for each value that is put into it."""
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_every_quoted_message_is_one_that_the_code_gives():
    text = (DOCS / "troubleshooting.md").read_text()
    quoted = [" ".join(q.replace("\n> ", " ").split()) for q in re.findall(r"^> (.+(?:\n> .+)*)", text, re.MULTILINE)]
    assert len(quoted) > 25
    known = "\n".join(template.replace("\n", " ") for template in templates())
    missing = []
    for message in quoted:
        pieces = [piece.strip() for piece in message.split("…") if piece.strip()]
        assert max(map(len, pieces)) > 20, message
        # what stands for a value may be several values
        if not re.search("[^\n]*".join(map(re.escape, pieces)), known):
            missing.append(message)
    assert not missing


def test_tables_of_measured_numbers_are_those_of_the_result_files():
    for page in PAGES:
        text = page.read_text()
        # test_benchmarks.py reads that page's
        assert page.name == "benchmarks.md" or with_tables(text) == text, page.name


def test_the_glossary_has_the_words_of_the_contributors_page():
    words = re.findall(r"^\| .+ \|$", (ROOT / "CONTRIBUTING.md").read_text().split("## Words")[1], re.MULTILINE)
    assert len(words) > 5
    assert set(words) <= set((DOCS / "glossary.md").read_text().splitlines())


def test_the_reference_has_every_public_name():
    referred = {
        name.rsplit(".", 1)[1] for name in re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(), re.MULTILINE)
    }
    assert {*modeling_ultrafuser.__all__, *trainers.__all__} <= referred


# ------------------------------------------------------------------------------------------------------- the site


class Fetched(HTMLParser):
    """Addresses that a browser fetches by itself to show a page."""

    def __init__(self):
        super().__init__()
        self.addresses, self.classes = [], set()

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.classes |= set((given.get("class") or "").split())
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed", "object"):
            self.addresses += [given[key] for key in ("src", "srcset", "data") if given.get(key)]
        elif tag == "link":
            self.addresses.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as `mkdocs build --strict` makes it, where a warning is an error and nobody is connected to."""
    build = pytest.importorskip("mkdocs.commands.build").build
    from mkdocs.config import load_config

    def connect(*_):
        raise OSError("the documentation is built without a network")

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(socket.socket, "connect", connect)
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def test_every_page_is_built_and_in_the_navigation(site):
    listed = [page for entry in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"] for page in entry.values()]
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))
    for page in listed:
        assert (site / page).with_suffix(".html").stat().st_size > 5000


def test_nothing_on_the_site_is_fetched_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(list(DOCS.glob("*.md")))
    for page in pages:
        found = Fetched()
        found.feed(page.read_text())
        elsewhere = [a for a in found.addresses if re.match(r"(https?:)?//", a)]
        assert not elsewhere, page.name
        # for which the theme would fetch a library
        assert not found.classes & {"mermaid", "arithmatex"}, page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", style.read_text()), style.name


def test_equations_are_drawn_by_the_browser_alone(site):
    page = (site / "how-it-works.html").read_text()
    written = (DOCS / "how-it-works.md").read_text()
    assert page.count('<div class="equation"><math') == written.count("$$") // 2 > 5
    assert page.count('<span class="equation"><math') > 20
    assert "\\sum" not in re.sub(r"<[^>]*>", "", page)


def test_pictures_follow_the_palette_of_the_page(site):
    page = (site / "pictures.html").read_text()
    pictures = (DOCS / "pictures.md").read_text().count("<picture>")
    assert page.count("#only-light") == page.count("#only-dark") == pictures > 3


def test_every_setting_of_a_stage_is_in_the_reference_with_its_help(site):
    page = (site / "api.html").read_text()
    for config in (trainers.GateStageConfig, trainers.JointStageConfig, MixConfig):
        for name in (*config.__annotations__, *MIXES, *SAMPLERS, *REWARDS, *POLICIES):
            assert f"<td><code>{name}</code></td>" in page
    assert trainers.JointStageConfig.__dataclass_fields__["train_specialists"].metadata["help"] in page


@pytest.mark.parametrize(
    "strategies", [GATES, FUSIONS, SPARSIFIERS, ROUTERS, MERGES, LAYOUTS, MIXES, REWARDS, POLICIES], ids=list
)
def test_every_strategy_is_on_the_page_that_helps_to_choose(site, strategies):
    page = (site / "strategies.html").read_text()
    assert not [name for name in strategies if f"<td><code>{name}</code></td>" not in page]


def test_every_way_of_decoding_is_on_the_page_that_helps_to_choose():
    page = (DOCS / "strategies.md").read_text()
    assert not [way for way in WAYS if way != "plain" and f"`{way}`" not in page]
