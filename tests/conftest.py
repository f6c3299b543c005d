import copy
import gc
import os
from collections import defaultdict
from pathlib import Path


# before transformers is imported: tests never reach for the network
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", CI="1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import set_seed

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.browsers import BROWSER
from tests.support.tiny import specialist, stir_gate


@pytest.fixture(scope="module")
def browser():
    """A headless one, for tests that are marked `in_browser`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


LANES = ("unit", "e2e", "process", "slow")
SECONDS = 5  # a unit test that takes longer is named at the end


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Gives each test its lane: `slow` where it says so, else what it says or its folder's name, else `unit`.

    Of a `grid`, whose cases take long together, the first and the last stay in their lane, and the others are slow.
    """
    grids = defaultdict(list)
    for item in items:
        if item.get_closest_marker("grid"):
            grids[item.path, item.originalname].append(item)
    for cases in grids.values():
        for item in cases[1:-1]:
            item.add_marker("slow")
    for item in items:
        own = {mark.name for mark in item.iter_markers()} & {*LANES}
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        lane = "slow" if "slow" in own else next(iter(own), folder if folder in LANES else "unit")
        if lane == "slow":
            item.own_markers = [mark for mark in item.own_markers if mark.name not in LANES]
        item.add_marker(lane)


LONG = []
FUSED = {}  # from specialists and random numbers to the model and the random numbers behind it


def pytest_runtest_logreport(report):
    if report.when == "call" and report.duration > SECONDS and "unit" in report.keywords:
        LONG.append(report)


def pytest_terminal_summary(terminalreporter):
    """Names unit tests that took long: on a quiet machine they belong into another lane."""
    if LONG:
        terminalreporter.section(f"unit tests over {SECONDS} s")
    for report in sorted(LONG, key=lambda report: -report.duration):
        terminalreporter.line(f"{report.duration:.1f} s  {report.nodeid}")


def pytest_collection_finish():
    """Leaves what is imported out of garbage collection, of which every trainer does one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _little_garbage():
    """Leaves out what earlier modules imported, too: a collection of all of it takes as long as a small training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.set_num_threads(1)
    set_seed(0)


@pytest.fixture
def specialists():
    """Three specialists of different depth, width and tying, in memory."""
    return {
        "text": specialist("llama", layers=2),
        "code": specialist("llama", layers=3, tied=True),
        "math": specialist("llama", layers=4, hidden_size=48),
    }


@pytest.fixture
def fused(specialists):
    """A fused model whose gate has opinions: a fresh one would weigh all specialists alike.

    A copy of one that was fused once: every test has the same seed, and the same random numbers behind this.
    """
    key = (torch.get_rng_state().numpy().tobytes(), *map(_content, specialists.items()))
    if key not in FUSED:
        model = UltraFuserForCausalLM.from_specialists(specialists, gate="mlp")
        stir_gate(model)
        FUSED[key] = model, torch.get_rng_state()
    model, state = FUSED[key]
    torch.set_rng_state(state)
    return copy.deepcopy(model)


def _content(named):
    name, model = named
    return name, model.config.to_json_string(), *(tensor.numpy().tobytes() for tensor in model.state_dict().values())
