"""Looking at a set: numbers that can be counted by hand, a page that stands alone, a card, and the way to the Hub."""

import json
import re
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard, HfApi
from typer.testing import CliRunner

from ultrafuser.cli.app import app
from ultrafuser.data.dataset_report import CARD, NUMBERS, PAGE, look, push_to_hub
from ultrafuser.data.sources import write_records


def says(answer, domain="text", topic="", licence="mit"):
    messages = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "domain": domain, "topic": topic, "source": "here", "licence": licence}


ATTACK = '<script>alert(1)</script> & "quotes" </pre> ```\n```'
RECORDS = [
    *(says(f"three four five {word}", topic="Birds") for word in ("wren", "crow", "kite", "tern")),
    says("THREE four five  wren", topic="Birds"),
    says("def f(): return 1", "code", "<i>Functions</i>"),
    says(ATTACK, "code", licence="apache-2.0"),
]


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    out = tmp_path_factory.mktemp("look")
    return look(iter(RECORDS), out, name="Birds & <code>"), out


def test_the_numbers_are_those_one_counts(looked):
    found, out = looked
    assert found == json.loads((out / NUMBERS).read_text())
    assert (found["records"], found["domains"]) == (7, {"text": 5, "code": 2})
    assert found["topics"] == {"text": {"Birds": 5}, "code": {"<i>Functions</i>": 1, "(none)": 1}}
    assert found["licences"] == {"mit": 6, "apache-2.0": 1}
    assert found["duplicates"] == {"exact": 1, "near": 0}
    # two words of the question, four of the answer
    assert found["lengths"]["text"] == {
        "mean": 6.0,
        "least": 6,
        **dict.fromkeys(["5%", "25%", "50%", "75%", "95%"], 6),
        "most": 6,
    }
    assert found["length_in"] == "words"


def test_instructions_responses_and_turns_are_counted_as_in_table_1_of_mixture_of_skills(tmp_path):
    longer = says("one")
    longer["messages"] = [*longer["messages"], *says("two words and more")["messages"]]
    longer["messages"].insert(0, {"role": "system", "content": "be nice"})
    found = look([says("a b c"), longer], tmp_path, points=0)
    # instructions of two words; responses of 3, 1 and 4
    assert found["turns"] == {"text": {"all": 5 + 2 + 3 + 6, "instruction": 2.0, "response": 2.7, "turns": 1.5}}
    assert "<td>16</td><td>2.0</td><td>2.7</td><td>1.5</td>" in (tmp_path / PAGE).read_text()


def test_lengths_are_counted_in_the_tokenizers_tokens(tmp_path):
    def letters(texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [list(text) for text in texts]}

    found = look([says("abc"), says("abcde")], tmp_path, tokenizer=letters)
    assert found["lengths"]["text"]["mean"] == len("one two") + 4
    assert found["length_in"] == "tokens"


def test_quantiles_are_the_lengths_that_so_many_do_not_exceed(tmp_path):
    found = look([says("word " * n) for n in range(1, 101)], tmp_path, points=0)
    lengths = found["lengths"]["text"]
    assert [lengths[q] - 2 for q in ("5%", "25%", "50%", "75%", "95%")] == [5, 25, 50, 75, 95]


class Elements(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_the_page_stands_alone_and_shows_texts_as_texts(looked):
    page = (looked[1] / PAGE).read_text()
    elements = Elements(page).found
    assert not {"script", "link", "iframe", "i", "code"} & {tag for tag, _ in elements}
    assert not [a for _, attributes in elements for a in ("src", "onload") if a in attributes]
    # the picture's parts refer to one another, and to nothing else
    assert all(a.get("xlink:href", "#").startswith(("#", "data:")) for _, a in elements)
    assert "Birds &amp; &lt;code&gt;" in page
    assert "&lt;script&gt;alert(1)" in page
    assert "svg" in {tag for tag, _ in elements}
    assert "prefers-color-scheme" in page or "light dark" in page


def test_the_same_seed_shows_the_same_samples(tmp_path):
    rows = [says(f"number {i}") for i in range(50)]
    pages = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        look(rows, tmp_path / name, points=0, seed=seed)
        pages.append((tmp_path / name / PAGE).read_text())
    assert pages[0] == pages[1] != pages[2]
    assert len(set(re.findall(r"number \d+", pages[0]))) == 3


def test_no_records_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there are none"):
        look([], tmp_path)


def test_the_card_has_the_hubs_metadata_and_no_text_breaks_out_of_it(looked):
    card = DatasetCard.load(looked[1] / CARD)
    assert card.data.license == ["apache-2.0", "mit"]
    assert card.data.size_categories == ["n<1K"]
    assert "| text | 5 | 1 | 6.0 | 2.0 | 4.0 | 1.0 |" in card.text
    fence = re.search(r"^(`{3,})json$", card.text, re.M)[1]
    inside = card.text.split(f"{fence}json\n")[1].split(f"\n{fence}\n")[0]
    assert json.loads(inside) in RECORDS


def test_an_uploaded_folder_loads_as_its_card_says(looked):
    out = looked[1]
    (out / "data").mkdir()
    write_records(RECORDS, out / "data" / "train.jsonl")
    assert load_dataset(str(out), split="train")["domain"] == [record["domain"] for record in RECORDS]


# the Hub


@contextmanager
def hub(visible=False):
    """A server that answers as the Hub does, and remembers what it was sent."""
    sent = []

    class Handler(BaseHTTPRequestHandler):
        def reply(self, body):
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.reply({"id": "me/birds", "private": not visible, "sha": "0" * 40, "siblings": []})

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            sent.append((self.path, body))
            if self.path.endswith("/create"):
                self.reply({"url": f"{address}/datasets/me/birds", "name": "me/birds"})
            elif "/preupload/" in self.path:
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                self.reply({"files": files})
            else:
                self.reply({"commitUrl": f"{address}/datasets/me/birds/commit/1", "commitOid": "1"})

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield HfApi(endpoint=address, token="hf_test"), sent
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def to_push(tmp_path):
    write_records(RECORDS, tmp_path / "kept.jsonl")
    (tmp_path / CARD).write_text("---\nlicense: mit\n---\n# Birds\n")
    return tmp_path / "kept.jsonl", tmp_path / CARD


def test_a_set_is_pushed_with_its_card_in_one_private_commit(to_push, online):
    records, card = to_push
    asked = []
    with hub() as (api, sent):
        url = push_to_hub(records, "me/birds", card=card, api=api, agree=lambda what: asked.append(what) or True)
    assert url.endswith("/commit/1")
    assert "0.0 MB, to the private dataset me/birds" in asked[0]
    created = json.loads(sent[0][1])
    assert (created["name"], created["type"], created["visibility"]) == ("birds", "dataset", "private")
    commit = [json.loads(line) for line in sent[-1][1].splitlines()]
    assert {line["value"]["path"] for line in commit if line["key"] == "file"} == {"data/train.jsonl", CARD}
    assert sum("/commit/" in path for path, _ in sent) == 1


def test_nothing_is_sent_without_a_yes_or_without_a_card(to_push, online):
    records, card = to_push
    with hub() as (api, sent):
        assert push_to_hub(records, "me/birds", card=card, api=api, agree=lambda _: False) is None
        with pytest.raises(FileNotFoundError, match="ultrafuser data look"):
            push_to_hub(records, "me/birds", card=card.with_name("none.md"), api=api)
        assert not sent


def test_what_is_to_be_private_is_not_sent_to_a_public_set(to_push, online):
    records, card = to_push
    with hub(visible=True) as (api, sent):
        with pytest.raises(ValueError, match="for all to see"):
            push_to_hub(records, "me/birds", card=card, api=api)
        assert not [path for path, _ in sent if "/commit/" in path]
        assert push_to_hub(records, "me/birds", card=card, api=api, private=False)


def test_the_command_looks_and_push_asks_first(tmp_path):
    # too few for a map, which is drawn elsewhere
    write_records(RECORDS[:4], tmp_path / "records.jsonl")
    done = CliRunner().invoke(app, ["data", "look", str(tmp_path / "records.jsonl"), "--out", str(tmp_path / "look")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "look" / PAGE).is_file()
    arguments = ["data", "push", str(tmp_path / "records.jsonl"), "me/birds", "--card", str(tmp_path / "look" / CARD)]
    said = CliRunner().invoke(app, arguments, input="n\n")
    assert "private dataset me/birds" in said.output
    assert "Nothing was sent." in said.output
