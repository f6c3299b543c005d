"""The page of papers and CITATION.cff against the code: every name exists and cites its paper, no paper is missing."""

import ast
import re
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[2]
FOLDERS = ("modeling_ultrafuser", "trainers", "ultrafuser", "experiments", "benchmarks", "examples")
PAGE = (ROOT / "docs" / "papers.md").read_text()
ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")
# the paper, and the dotted names of where it is implemented
ROWS = [
    (cells[0], re.findall(r"`([\w.]+)`", cells[-1]))
    for cells in (line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| "))
    if cells[0] != "paper"
]


def located(name):
    """File of a module, or of a class or function in one, and whether that is defined there."""
    folder = ROOT / name.replace(".", "/")
    if folder.with_suffix(".py").is_file() or folder.is_dir():
        return folder.with_suffix(".py") if folder.with_suffix(".py").is_file() else folder / "__init__.py"
    file = folder.parent.with_suffix(".py")
    defined = {node.name for node in ast.parse(file.read_text()).body if hasattr(node, "name")}
    assert folder.name in defined, f"{file} defines no {folder.name}"
    return file


def test_there_are_rows():
    assert len(ROWS) > 25


@pytest.mark.parametrize(("paper", "names"), ROWS, ids=[paper[:40] for paper, _ in ROWS])
def test_every_paper_is_cited_where_it_is_said_to_be_implemented(paper, names):
    author, number = re.match(r"(\w+)", paper)[1], ARXIV.findall(paper)
    sources = [located(name).read_text() for name in names]
    assert sources
    assert any(number[0] in text if number else author in text for text in sources)


def test_every_arxiv_number_in_the_code_is_on_the_page():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    cited = {
        number
        for path in files
        for line in path.read_text().splitlines()
        if "arxiv" in line.lower()
        for number in ARXIV.findall(line)
    }
    assert len(cited) > 25
    assert cited <= set(ARXIV.findall(PAGE))


def test_links_and_numbers_on_the_page_agree():
    links = re.findall(r"\[([\d.]+)\]\(https://arxiv\.org/abs/([\d.]+)\)", PAGE)
    assert all(shown == linked for shown, linked in links)
    assert len({shown for shown, _ in links}) == len(links)


def test_the_citation_is_of_this_version_and_of_papers_on_the_page():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    package = ConfigParser()
    package.read(ROOT / "setup.cfg")
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == package["metadata"]["version"]
    assert citation["license"] == package["metadata"]["license"]
    assert citation["authors"] == [{"name": package["metadata"]["author"]}]
    for paper in citation["references"]:
        assert f"{paper['authors'][0]['family-names']} et al., {paper['year']}, *{paper['title']}*" in PAGE
        assert paper["url"].rpartition("/")[2] in ARXIV.findall(PAGE)


def test_the_newest_release_of_the_changelog_is_the_version():
    package = ConfigParser()
    package.read(ROOT / "setup.cfg")
    releases = re.findall(r"^## (\d\S*) - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert releases[0] == (package["metadata"]["version"], str(citation["date-released"]))
