"""How far long work is, where nobody watches and where somebody does."""

import io
import sys

from transformers import TrainerControl, TrainerState, TrainingArguments

from trainers.progress import Progress, ProgressOfTraining


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_a_line_comes_now_and_then(capsys, monkeypatch):
    now = iter([0, 10, 31, 40, 70])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    with Progress("rows", 40, every=30) as progress:
        for _ in range(4):
            progress.add(10)
    # the last one is the end, which needs none
    assert capsys.readouterr().err.splitlines() == ["rows: 20 of 40, about 1 min left"]


def test_what_was_done_before_counts_as_done_and_not_in_the_time_that_is_left(capsys, monkeypatch):
    now = iter([0, 60])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    Progress("rows", 100, done=40, every=30).add(20)
    assert capsys.readouterr().err == "rows: 60 of 100, about 2 min left\n"


def test_in_a_terminal_there_is_a_bar_whatever_is_said_to_others(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("rows", 4) as progress:
        progress.add(2)
        assert "rows:" in sys.stderr.getvalue()
        assert progress.bar.n == 2


def test_steps_of_a_trainer_are_counted_from_where_it_goes_on(tmp_path):
    callback, state = ProgressOfTraining("gate"), TrainerState(max_steps=10, global_step=4)
    about = TrainingArguments(str(tmp_path), use_cpu=True), state, TrainerControl()
    callback.on_train_begin(*about)
    callback.on_step_end(*about)
    callback.on_train_end(*about)
    assert (callback.progress.done, callback.progress.total) == (5, 10)
