"""Looking at a set: what is in it, as numbers, as a page and as a dataset card, and the way to the Hub."""

import json
import random
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import jinja2
import numpy as np
from huggingface_hub import CommitOperationAdd, DatasetCard, DatasetCardData, HfApi
from tqdm.auto import tqdm

from ..atomic import sole_writer, write_whole
from ..plain import markdown, plain
from .duplicates import DuplicateIndex, fingerprint


PAGE, CARD, NUMBERS = "index.html", "README.md", "statistics.json"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))


def look(
    records: Iterable[dict],
    out: Path,
    *,
    name: str = "data",
    tokenizer: Callable | None = None,
    samples: int = 3,
    points: int = 2000,
    seed: int = 0,
) -> dict:
    """Writes `statistics.json`, a page `index.html` that needs no other file, and a dataset card `README.md`.

    The records are read once, and what is held of them does not grow with their number: counts, an index on disk, and
    the samples.

    Args:
        records: The records, streamed.
        out: Folder to write to; made if it is not there.
        name: Name of the set.
        tokenizer: Lengths are counted in its tokens. Default: in words.
        samples: Records of each domain that are shown, drawn at random.
        points: Records on the map, drawn at random. None below five.
        seed: Same seed, same samples and same map.

    Returns:
        The statistics.

    Raises:
        ValueError: If there are no records.
    """
    with sole_writer(out, "data look", (PAGE, CARD, NUMBERS, "map.*")):
        found, shown, mapped = _statistics(records, out, name, tokenizer, samples, points, random.Random(seed))
        figure = _map(mapped, out, seed) if len(mapped) >= 5 else ""
        write_whole(out / NUMBERS, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(Path(__file__).with_name("dataset_report.html").read_text(encoding="utf-8"))
        page = template.render(statistics=found, samples=shown, map=figure, quantiles=[f"{q:.0%}" for q in QUANTILES])
        write_whole(out / PAGE, page)
        write_whole(out / CARD, str(card(found, shown)))
    return found


def _statistics(records, out: Path, name: str, tokenizer, samples: int, points: int, rng: random.Random):
    counts = {key: Counter() for key in ("domain", "source", "licence")}
    topics, lengths, repeats = defaultdict(Counter), defaultdict(Counter), Counter()
    turns = defaultdict(Turns)
    shown, mapped, number = defaultdict(list), [], 0
    with (
        tempfile.TemporaryDirectory(dir=out, prefix=".index-") as folder,
        DuplicateIndex(Path(folder) / "index.sqlite") as index,
    ):
        for number, record in enumerate(tqdm(records, unit=" records", disable=None), start=1):
            domain = record["domain"]
            for key, counter in counts.items():
                counter[record[key]] += 1
            topics[domain][record["topic"] or "(none)"] += 1
            each = _lengths(record, tokenizer)
            lengths[domain][sum(each)] += 1
            turns[domain].add(record, each)
            kind, _ = index.repeats(number, fingerprint(record)) or ("none", "")
            repeats[kind] += 1
            _keep_some(shown[domain], record, counts["domain"][domain], samples, rng)
            _keep_some(mapped, record, number, points, rng)
    if not number:
        raise ValueError("There is something to look at where there are records, but there are none.")
    statistics = {
        "name": name,
        "records": number,
        "length_in": "tokens" if tokenizer else "words",
        **{f"{key}s": dict(counter.most_common()) for key, counter in counts.items()},
        "topics": {domain: dict(counter.most_common()) for domain, counter in topics.items()},
        "lengths": {domain: _summary(counter) for domain, counter in lengths.items()},
        "turns": {domain: found.means(counts["domain"][domain]) for domain, found in turns.items()},
        "duplicates": {"exact": repeats["duplicate"], "near": repeats["near_duplicate"]},
    }
    return statistics, dict(shown), mapped


class Turns:
    """Sums up a domain's conversations, for the columns of table 1 of Mixture-of-Skills (Wu et al., 2024)."""

    def __init__(self):
        self.lengths, self.numbers = Counter(), Counter()

    def add(self, record: dict, lengths: list[int]) -> None:
        """Counts a record, whose messages have these lengths."""
        for message, length in zip(record["messages"], lengths, strict=True):
            self.lengths[message["role"]] += length
            self.numbers[message["role"]] += 1

    def means(self, records: int) -> dict:
        """Returns the length of all messages, the mean instruction's and response's, and responses per record."""
        means = {role: self.lengths[role] / max(self.numbers[role], 1) for role in ("user", "assistant")}
        return {
            "all": self.lengths.total(),
            "instruction": round(means["user"], 1),
            "response": round(means["assistant"], 1),
            "turns": round(self.numbers["assistant"] / records, 1),
        }


def _lengths(record: dict, tokenizer: Callable | None) -> list[int]:
    texts = [message["content"] for message in record["messages"]]
    if tokenizer is None:
        return [len(re.findall(r"\w+", text)) for text in texts]
    return list(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))


def _keep_some(kept: list, record: dict, number: int, most: int, rng: random.Random) -> None:
    """Reservoir sampling: of all records so far, each is among the kept ones with the same probability."""
    if len(kept) < most:
        kept.append(record)
    elif (place := rng.randrange(number)) < most:
        kept[place] = record


def _summary(lengths: Counter) -> dict:
    ordered, counts = np.array(sorted(lengths.items())).T
    places = np.searchsorted(counts.cumsum(), np.multiply(QUANTILES, counts.sum()))
    quantiles = {f"{q:.0%}": int(length) for q, length in zip(QUANTILES, ordered[places], strict=True)}
    mean = ordered @ counts / counts.sum()
    return {"mean": round(float(mean), 1), "least": int(ordered[0]), **quantiles, "most": int(ordered[-1])}


def _map(records: list[dict], out: Path, seed: int) -> str:
    # heavy, and only needed here
    from ultrafuser.reports.plots import draw_map, save, tsne

    texts = ["\n".join(message["content"] for message in record["messages"]) for record in records]
    topics = [record["topic"] for record in records]
    domains = [record["domain"] for record in records]
    return save(out / "map", draw_map, tsne(texts, seed=seed), domains, topics if any(topics) else None)


def card(statistics: dict, samples: dict[str, list[dict]]) -> DatasetCard:
    """A dataset card with the Hub's metadata: licences, size, tables, one sample, and how to train on it."""
    licences = sorted(statistics["licences"])
    data = DatasetCardData(
        license=licences if len(licences) > 1 else licences[0],
        pretty_name=statistics["name"],
        task_categories=["text-generation"],
        tags=["instruction-tuning", "ultrafuser"],
        size_categories=[next((label for size, label in SIZES if statistics["records"] < size), "n>10M")],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train.jsonl"}]}],
    )
    sample = plain(json.dumps(next(iter(samples.values()))[0], indent=2, ensure_ascii=False))
    # a fence that no text of the sample can end
    fence = "`" * (max(map(len, re.findall("`+", sample)), default=0) + 3)
    return DatasetCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("dataset_card.jinja")),
        name=markdown(statistics["name"]),
        statistics=statistics,
        markdown=markdown,
        sample=sample,
        fence=fence,
    )


def push_to_hub(
    records: Path,
    repo_id: str,
    *,
    card: Path,
    private: bool = True,
    api: HfApi | None = None,
    agree: Callable[[str], bool] = lambda _: True,
) -> str | None:
    """Uploads a set and its card in one commit.

    Args:
        records: The file of records.
        repo_id: "owner/name" of the set on the Hub; made if it is not there.
        card: The dataset card, from `look`.
        private: Whether only its owner sees it.
        api: The Hub, and who asks. Default: huggingface.co, and whoever is logged in.
        agree: Is told what would be sent, how large it is and who would see it, before anything is. Nothing is sent
            unless it says yes.

    Returns:
        Address of the commit, or None if nothing was sent.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If the set is there already, for all to see, but is to be private.
    """
    for path in (records, card):
        if not path.is_file():
            raise FileNotFoundError(
                f"A set is pushed together with its card, but there is no {str(path)!r}. Make one: ultrafuser data look."
            )
    megabytes = sum(path.stat().st_size for path in (records, card)) / 1e6
    visible = "private" if private else "public"
    if not agree(f"{records} and {card}, {megabytes:.1f} MB, to the {visible} dataset {repo_id}"):
        return None
    api = api or HfApi()
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    if private and not api.repo_info(repo_id, repo_type="dataset").private:
        raise ValueError(
            f"The set is to be private, but {repo_id!r} is there already, for all to see. Push to another, or change "
            f"its visibility, or ask for a public one."
        )
    operations = [CommitOperationAdd("data/train.jsonl", records), CommitOperationAdd(CARD, card)]
    return str(
        api.create_commit(repo_id, operations, commit_message="Records and card", repo_type="dataset").commit_url
    )
