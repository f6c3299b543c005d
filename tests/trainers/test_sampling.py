import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader

from tests.support.stages import domains, trainer
from trainers import GateTrainer, StratifiedSampler


SIZES = {"code": 7, "math": 30, "text": 12}
NAMES = [name for name, size in SIZES.items() for _ in range(size)]


def by_domain(draws, names=NAMES):
    """How many draws are of each domain, in alphabetical order. Shape (domains,)."""
    drawn = [names[i] for i in draws]
    return np.array([drawn.count(name) for name in sorted(set(names))])


def stream(sampler, epochs):
    """The draws of the first so many epochs, batch by batch."""
    draws = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        draws += list(sampler)
    return [draws[i : i + sampler.batch_size] for i in range(0, len(draws), sampler.batch_size)]


def test_a_share_that_is_a_whole_number_is_met_in_every_batch():
    sampler = StratifiedSampler(NAMES, 8, [0.25, 0.625, 0.125])
    assert all((by_domain(batch) == [2, 5, 1]).all() for batch in stream(sampler, 20))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
@pytest.mark.parametrize("mix", [[0.2, 0.7, 0.1], [1 / 3, 1 / 3, 1 / 3], [0.01, 0.98, 0.01]])
def test_any_other_share_is_met_within_one_in_a_batch_and_exactly_in_the_long_run(batch_size, mix):
    sampler = StratifiedSampler(NAMES, batch_size, mix)
    batches = stream(sampler, 1 + 2000 // len(sampler) * 2)
    counts = np.array([by_domain(batch) for batch in batches])
    assert (abs(counts - batch_size * np.array(mix)) < 1 + 1e-9).all()
    assert counts.sum(0) / counts.sum() == pytest.approx(mix, abs=0.005)


def test_counts_are_what_is_drawn_also_where_the_mix_changes():
    sampler = StratifiedSampler(NAMES, 5, [0.2, 0.7, 0.1])
    sampler.set_mix([0.5, 0.1, 0.4], 4)
    sampler.set_mix([0.1, 0.1, 0.8], 11)
    drawn = np.cumsum([by_domain(batch) for batch in stream(sampler, 3)], axis=0)
    assert all((sampler.counts(n + 1) == drawn[n]).all() for n in range(len(drawn)))
    assert (drawn[10] - drawn[3]).argmin() == 1
    assert (drawn[-1] - drawn[10]).argmax() == 2


def test_no_example_of_a_domain_repeats_before_all_were_drawn():
    sampler = StratifiedSampler(NAMES, 6, [0.6, 0.3, 0.1])
    draws = [i for batch in stream(sampler, 8) for i in batch]
    for name, size in SIZES.items():
        own = [i for i in draws if NAMES[i] == name]
        cycles = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
        assert all(len(set(cycle)) == size for cycle in cycles)


def test_a_domain_without_a_share_is_never_drawn():
    sampler = StratifiedSampler(NAMES, 5, [0.5, 0.0, 0.5])
    sampler.set_mix([0.7, 0.3, 0.0], 9)
    batches = np.array([by_domain(batch) for batch in stream(sampler, 4)])
    assert not batches[:9, 1].any()
    assert not batches[9:, 2].any()
    assert batches[9:, 1].any()


def test_a_mix_cannot_change_what_was_drawn():
    sampler = StratifiedSampler(NAMES, 6)
    draws = iter(sampler)
    for _ in range(7):  # into the second batch
        next(draws)
    with pytest.raises(RuntimeError, match="begin at batch 1 and the data loader has read ahead to batch 2"):
        sampler.set_mix([0.5, 0.25, 0.25], 1)
    sampler.set_mix([1, 0, 0], 2)
    for _ in range(5):
        next(draws)
    assert (by_domain([next(draws) for _ in range(6)]) == [6, 0, 0]).all()


def test_a_later_mix_is_forgotten_when_an_earlier_one_is_set():
    sampler = StratifiedSampler(NAMES, 6)
    sampler.set_mix([1, 0, 0], 5)
    sampler.set_mix([0, 1, 0], 4)
    assert sampler.mix(9).tolist() == [0, 1, 0]


def test_every_part_of_a_batch_gets_its_share():
    sampler = StratifiedSampler(["a"] * 40 + ["b"] * 40, 8)
    for batch in stream(sampler, 3):
        assert [sum(i < 40 for i in batch[start : start + 2]) for start in (0, 2, 4, 6)] == [1, 1, 1, 1]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_processes_share_one_stream(ranks):
    """As accelerate shards it: batches of a process's size are dealt out in turn."""
    whole = [sorted(batch) for batch in stream(StratifiedSampler(NAMES, 12, [0.2, 0.7, 0.1], seed=3), 1)]
    parts = []
    for rank in range(ranks):
        batches = BatchSampler(StratifiedSampler(NAMES, 12, [0.2, 0.7, 0.1], seed=3), 2, drop_last=False)
        parts.append(list(BatchSamplerShard(batches, ranks, rank)))
    at_once = 12 // (2 * ranks)
    for number, batch in enumerate(whole):
        dealt = [i for part in parts for micro in part[number * at_once :][:at_once] for i in micro]
        assert sorted(dealt) == batch


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_the_stream(workers):
    sampler = StratifiedSampler(NAMES, 6, seed=1)
    loader = DataLoader(range(len(NAMES)), batch_size=3, sampler=sampler, num_workers=workers)
    drawn = [batch.tolist() for batch in loader]
    expected = [part for batch in stream(StratifiedSampler(NAMES, 6, seed=1), 1) for part in (batch[:3], batch[3:])]
    assert drawn == expected


@pytest.mark.e2e
def test_the_trainer_draws_the_stream_across_epochs_and_from_the_middle_of_one(fused, tmp_path):
    def run(folder, resume=None):
        settings = {"max_steps": 9, "save_strategy": "steps", "save_steps": 5, "per_device_train_batch_size": 2}
        stage = trainer(GateTrainer, fused, tmp_path / folder, domains({"text": 8, "code": 6, "math": 9}), **settings)
        seen = []
        rows = [tuple(row["input_ids"]) for row in stage.train_dataset]

        def collate(batch, original=stage.data_collator):
            seen.extend(rows.index(tuple(row["input_ids"])) for row in batch)
            return original(batch)

        stage.data_collator = collate
        # the same sums are in every domain: an example is known by its row
        expected = [tuple(rows[i]) for batch in stream(stage.sampler, 3) for i in batch]
        stage.sampler.batches_drawn = 0
        stage.train(resume)
        return [rows[i] for i in seen], expected

    drawn, expected = run("whole")
    assert drawn[: 9 * 6] == expected[: 9 * 6]
    resumed, _ = run("halves", str(tmp_path / "whole" / "checkpoint-5"))
    assert resumed[: 4 * 6] == expected[5 * 6 : 9 * 6]
