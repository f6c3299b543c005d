"""A refusal is four parts and one text, wherever it is caught."""

import pickle

import pytest

from modeling_ultrafuser.refusals_ultrafuser import MissingPackageError, Refusal, UnavailableError


PARTS = ("head", "the head of 'text' has a bias", "A head must have none, because it is one matrix", "Take it off.")


def test_the_text_is_the_fact_then_the_rule_then_the_way_out():
    refusal = Refusal(*PARTS)
    assert (
        str(refusal) == "The head of 'text' has a bias. A head must have none, because it is one matrix. Take it off."
    )
    assert refusal.problem == "The head of 'text' has a bias. A head must have none, because it is one matrix."
    assert (refusal.about, refusal.fact, refusal.rule, refusal.way_out) == PARTS


def test_parts_that_are_empty_leave_no_gap():
    assert str(Refusal("file", "'a.json' is damaged", "", "")) == "'a.json' is damaged."
    assert str(Refusal("file", "'a.json' is damaged", "", "Fetch it again.")) == "'a.json' is damaged. Fetch it again."


@pytest.mark.parametrize(("kind", "other"), [(UnavailableError, OSError), (MissingPackageError, ImportError)])
def test_it_is_caught_as_what_it_is_and_as_a_refusal(kind, other):
    for caught in (Refusal, ValueError, other):
        with pytest.raises(caught, match="Take it off"):
            raise kind(*PARTS)


@pytest.mark.parametrize("kind", [Refusal, UnavailableError, MissingPackageError])
def test_it_reaches_another_process_whole(kind):
    again = pickle.loads(pickle.dumps(kind(*PARTS)))
    assert type(again) is kind
    assert (str(again), again.about) == (str(kind(*PARTS)), "head")
