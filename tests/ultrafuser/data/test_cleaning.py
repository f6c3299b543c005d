"""Filters of data: what they drop, what they leave, and that how they are run changes nothing."""

import json
import random

import numpy as np
import pytest

from benchmarks.data_cleaning import PLANTS, recall
from ultrafuser.data.arithmetic import wrong_arithmetic
from ultrafuser.data.cleaning import DROPPED, KEPT, REPORT, clean, table
from ultrafuser.data.decontamination import contaminated, gram_hashes, strings
from ultrafuser.data.duplicates import DuplicateIndex, fingerprint, jaccard
from ultrafuser.data.filters import broken_code, refusal, wrong_language, wrong_length
from ultrafuser.data.ranked_filters import keep_difficult, keep_style, style_distances
from ultrafuser.data.sources import read_lines, write_records


pytest.importorskip("py3langid")


PROSE = "The gate looks at every specialist and says how much of its prediction goes into the answer at this token."


def says(answer, question="What is this?", domain="text"):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "domain": domain, "topic": "", "source": "here", "licence": "mit"}


@pytest.mark.parametrize(
    ("answer", "said"),
    [("", "message 1 (assistant) is empty"), ("no", "15 characters"), ("no" * 50_000, "characters")],
)
def test_too_short_too_long_and_empty_are_told(answer, said):
    assert said in wrong_length(says(answer))


def test_a_conversation_ends_with_an_answer():
    record = says(PROSE)
    assert wrong_length(record) is None
    record["messages"].append({"role": "user", "content": "And then?"})
    assert "the user's" in wrong_length(record)


@pytest.mark.grid
@pytest.mark.parametrize(
    ("answer", "language"),
    [
        ("Die Katze sitzt auf dem Dach und schaut den Vögeln zu, die über die Stadt fliegen.", "de"),
        ("Le chat est assis sur le toit et regarde les oiseaux qui volent au-dessus de la ville.", "fr"),
        ("猫坐在屋顶上，看着飞过城市的鸟儿，然后慢慢地走回家，吃完晚饭以后就在窗边睡着了，直到第二天早上。", "zh"),
    ],
)
def test_another_language_is_dropped_unless_it_is_asked_for(answer, language):
    assert f"'{language}'" in wrong_language(says(answer))
    assert wrong_language(says(answer), languages=("en", language)) is None


@pytest.mark.grid
@pytest.mark.parametrize("answer", [PROSE, "x = 6/3 = 2", "42", "```python\nfor i in range(3): print(i)\n```"])
def test_english_formulas_and_code_are_not_another_language(answer):
    assert wrong_language(says(answer)) is None


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but as an AI I cannot do this.",
        "I cannot assist with that request.",
        "As an AI language model, I don't have personal opinions.",
        "Unfortunately, I am unable to provide that.",
        "Sorry, I don't have access to the internet.",
    ],
)
def test_refusals_are_dropped(answer):
    assert refusal(says(answer))


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry to hear that you are ill. Rest, and drink a lot.",
        "Sorry for the confusion. Here is the corrected function.",
        "You can write to them: I'm sorry, but I can't come to your party.",
        "I can't find an error in your code: it does what it should.",
        "Unfortunately, the train was late. We walked.",
    ],
)
def test_an_apology_is_no_refusal(answer):
    assert refusal(says(answer)) is None


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("```python\ndef f(x)\n    return x\n```", "line 1: 'def f(x)'"),
        ("```py\nx = (1,\n```", "never closed"),
        ("Here:\n\n  ```python\n  if x:\n  y = 1\n  ```", "indented"),
        ("```python\nprint('cut off')\n", "never ends"),
    ],
)
def test_python_that_does_not_parse_is_dropped_with_the_line(code, said):
    assert said in broken_code(says(code))


@pytest.mark.parametrize(
    "code",
    [
        "```python\ndef f(x):\n    return x\n```",
        "1. First:\n\n   ```python\n   x = 1\n   ```\n",
        "```c\nint main( {\n```",
        "```\nx = (\n```",
        "```python\n>>> f(1)\n2\n```",
        "```python\n%timeit f(1)\n!pip install x\nawait f()\n```",
        "~~~python\ntext = '''\n```\n'''\n~~~",
    ],
)
def test_python_that_parses_and_all_other_languages_stay(code):
    assert broken_code(says(code)) is None


def test_only_what_the_assistant_says_is_judged():
    fence = "```python\nx = (\n```"
    assert broken_code(says("You forgot a parenthesis.", question=fence)) is None
    assert wrong_arithmetic(says("No, it is four.", question="2 + 2 = 5")) is None


def test_exact_duplicates_differ_in_case_and_white_space_only(tmp_path):
    a, b, c = says("Add a and b."), says("add  A\nand b."), says("Add a or b.")
    assert fingerprint(a).digest == fingerprint(b).digest != fingerprint(c).digest
    with DuplicateIndex(tmp_path / "index") as index:
        index.add(7, fingerprint(a))
        assert index.exact(fingerprint(b)) == 7
        assert index.exact(fingerprint(c)) is None


def test_similarity_is_the_share_of_shingles_that_two_records_have_in_common():
    one, two = (says(" ".join(map(str, numbers)), question="") for numbers in (range(24), range(4, 28)))
    # of runs of five, each has 20, from 0 and from 4 on: 16 of 24 are common
    assert jaccard(fingerprint(one).shingles, fingerprint(two).shingles) == pytest.approx(16 / 24)


def test_the_most_similar_record_is_found_and_named_if_it_reaches_the_threshold(tmp_path):
    words = [f"word{i}" for i in range(200)]
    other = says(" ".join(words))
    for changed, found in ((2, True), (40, False)):
        near = says(" ".join(f"new{i}" if i % (200 // changed) == 0 else w for i, w in enumerate(words)))
        with DuplicateIndex(tmp_path / f"{changed}") as index:
            index.add(1, fingerprint(says(PROSE)))
            index.add(2, fingerprint(other))
            hit = index.near(fingerprint(near))
        assert (hit is not None) is found
        if found:
            assert hit == (2, jaccard(fingerprint(near).shingles, fingerprint(other).shingles))


def test_a_threshold_that_is_no_similarity_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Jaccard"):
        DuplicateIndex(tmp_path / "index", 70)


def test_thirteen_words_in_a_row_are_contamination_and_twelve_are_not():
    words = [f"w{i}" for i in range(14)]
    known = {"exam": gram_hashes(["Before. " + " ".join(words[:13]) + "!"])}
    hit = contaminated(says("I say: " + ", ".join(words).upper()), known)
    assert hit == "shares with exam: 'w0 w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12'"
    assert contaminated(says("I say: " + " ".join(words[:12]) + " and so on"), known) is None


def test_a_short_question_is_found_where_it_is_the_whole_message():
    known = {"exam": gram_hashes(["What is the capital of France?", "Yes"])}
    assert contaminated(says("Paris.", question="what is the capital of france"), known)
    assert contaminated(says("Paris.", question="Tell me: what is the capital of France?"), known) is None
    assert contaminated(says("Yes"), known) is None


def test_all_texts_of_a_row_are_found_however_deep():
    row = {"question": "a", "choices": {"text": ["b", "c"], "label": [0, 1]}, "more": [{"x": ("d", None)}]}
    assert list(strings(row)) == ["a", "b", "c", "d"]


@pytest.mark.slow
def test_plants_are_found_and_nothing_else_is_dropped():
    """1,200 records, of which two in five are planted.

    Every plant but one is of a form that its filter is made for, so all of them should be found; one in twenty is left
    to chance, since MinHash draws lots. One sum in seven has words in between, which the filter does not read. No
    other record repeats one, shares thirteen words with the evaluation set or is wrong, so none should be dropped; one
    in a hundred is left.
    """
    found = recall()
    assert found["records"] == 1200
    for name in PLANTS:
        assert found["plants"][name]["planted"] > 50
        assert found["plants"][name]["recall"] >= (0.8 if name == "arithmetic" else 0.95), name
    assert found["false_positive_rate"] <= 0.01, found["which"]


@pytest.mark.slow
def test_results_are_the_same_with_one_process_and_with_two(tmp_path):
    rng = random.Random(1)
    words = [f"word{i}" for i in range(300)]
    rows = [says(" ".join(rng.sample(words, 60)), domain=rng.choice(["text", "code"])) for _ in range(200)]
    # all are dropped for another reason, some because of one that another process looked at
    for i in range(20, 200, 10):
        rows[i] = rng.choice([rows[i - 20], rows[i - 19], says(f"{i} + 1 = {i}"), says(" ".join(words[i : i + 14]))])
    known = {"exam": gram_hashes([" ".join(words)])}
    reports = [clean(rows, tmp_path / str(n), evaluation=known, processes=n, skip=["language"]) for n in (1, 2)]
    assert reports[0] == reports[1]
    for name in (KEPT, DROPPED, REPORT):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert all(reports[0]["dropped"][name] for name in ("duplicate", "arithmetic", "contamination"))
    assert sum(reports[0]["dropped"].values()) + reports[0]["kept"] == 200


def test_nothing_is_lost_and_every_dropped_record_says_why(tmp_path):
    rows = [says(PROSE), says("2 + 2 = 5, as everyone knows."), says(PROSE.upper()), says(PROSE, domain="code")]
    report = clean(iter(rows), tmp_path)
    assert [line["messages"][1]["content"] for line in read_lines(tmp_path / KEPT)] == [PROSE]
    assert [(line["row"], line["filter"], line["why"]) for line in read_lines(tmp_path / DROPPED)] == [
        (2, "arithmetic", "2 + 2 = 5"),
        (3, "duplicate", "same as row 1"),
        (4, "duplicate", "same as row 1"),
    ]
    assert [line["record"] for line in read_lines(tmp_path / DROPPED)] == rows[1:]
    assert report["dropped"] == {**dict.fromkeys(report["filters"], 0), "arithmetic": 1, "duplicate": 2}
    assert report["domains"] == {"text": {"kept": 1, "arithmetic": 1, "duplicate": 1}, "code": {"duplicate": 1}}
    assert table(report).splitlines()[-1].split() == ["kept", "1", "0", "1"]


def test_records_are_read_as_they_are_needed_and_not_before(tmp_path):
    begun = []

    def stream():
        for i in range(2000):
            begun.append(i)
            # the first message that is not text stops everything
            yield says(f"{PROSE} {i}") if i < 200 else {"messages": None}

    with pytest.raises(TypeError):
        clean(stream(), tmp_path / "out", skip=["language"])
    assert len(begun) < 500
    assert not (tmp_path / "out" / KEPT).exists()


def test_what_is_there_stays_unless_one_asks_and_filters_are_known(tmp_path):
    clean([says(PROSE)], tmp_path, skip=["language"])
    with pytest.raises(FileExistsError, match="holds a cleaned set"):
        clean([], tmp_path)
    assert clean([], tmp_path, overwrite=True)["records"] == 0
    with pytest.raises(ValueError, match="'languages'"):
        clean([], tmp_path / "new", skip=["languages"])
    assert not (tmp_path / "new").exists()


def test_half_a_surrogate_pair_goes_through(tmp_path):
    clean([says(PROSE + " \ud83d")], tmp_path, evaluation={"exam": gram_hashes([PROSE])}, skip=["contamination"])
    assert next(read_lines(tmp_path / KEPT))["messages"][1]["content"] == PROSE + " \ud83d"


def odd_one_out():
    plain = [says(f"{PROSE} It does so for token {i}, and then for the next one.") for i in range(9)]
    return [*plain, says("!!! # WOW ???\n- yes\n- no\n- !!!")]


def test_the_style_furthest_from_the_usual_one_goes(tmp_path):
    write_records(odd_one_out(), tmp_path / "records.jsonl")
    distances = style_distances(tmp_path / "records.jsonl")
    assert distances.argmax() == 9
    clean(odd_one_out(), tmp_path, near=1.0, skip=["language"])
    report = keep_style(tmp_path, 0.9)
    assert (report["kept"], report["dropped"]["style"], report["records"]) == (9, 1, 10)
    last = [*read_lines(tmp_path / DROPPED)][-1]
    assert (last["row"], last["filter"], last["record"]) == (10, "style", odd_one_out()[9])
    assert json.loads((tmp_path / REPORT).read_text()) == report


def test_distances_are_mean_squared_z_scores(tmp_path):
    path = tmp_path / "records.jsonl"
    write_records(odd_one_out(), path)
    from ultrafuser.data.ranked_filters import style

    styles = np.array([style(record) for record in odd_one_out()])
    varies = styles.std(0) > 1e-9
    z = (styles - styles.mean(0))[:, varies] / styles.std(0)[varies]
    np.testing.assert_allclose(style_distances(path), (z**2).mean(1))


def test_ifd_keeps_its_share_of_every_domain_and_names_rows_of_the_input(tmp_path):
    from tests.support.conversations import CHAT_TEMPLATE
    from tests.support.tiny import specialist, tokenizer

    rows = [
        says("no"),
        *(says(f"{w} is {w} in {d}", domain=d) for d in ("text", "code") for w in ("ant", "bee", "cow")),
    ]
    clean(rows, tmp_path, shortest=19, near=1.0, skip=["language"])
    assert next(read_lines(tmp_path / DROPPED))["row"] == 1
    model, spelling = specialist(), tokenizer(chat_template=CHAT_TEMPLATE)
    before = [*read_lines(tmp_path / KEPT)]
    report = keep_difficult(tmp_path, model, spelling, 0.34)
    dropped = [line for line in read_lines(tmp_path / DROPPED) if line["filter"] == "ifd"]
    kept = [*read_lines(tmp_path / KEPT)]
    assert [record["domain"] for record in kept] == ["text", "code"]
    assert report["dropped"]["ifd"] == len(dropped) == 4
    assert all(rows[line["row"] - 1] == line["record"] for line in dropped)
    assert sorted(map(str, [*kept, *(line["record"] for line in dropped)])) == sorted(map(str, before))


@pytest.mark.parametrize("share", [0, 1.5])
def test_a_share_that_is_none_is_refused_before_anything_is_read(tmp_path, share):
    for keep in (lambda: keep_style(tmp_path, share), lambda: keep_difficult(tmp_path, None, None, share)):
        with pytest.raises(ValueError, match="part of the records"):
            keep()
