"""A refusal is four parts and one text, wherever it is caught."""

import pickle

import pytest

from modeling_ultrafuser.refusals_ultrafuser import MissingPackageError, Refusal, UnavailableError


PARTS = ("the head of 'text' has a bias", "A head must have none, because it is one matrix", "Take it off.")


def test_the_text_is_the_fact_then_the_rule_then_the_way_out():
    refusal = Refusal(*PARTS, about="head")
    assert (
        str(refusal) == "The head of 'text' has a bias. A head must have none, because it is one matrix. Take it off."
    )
    assert refusal.problem == "The head of 'text' has a bias. A head must have none, because it is one matrix."
    assert (refusal.fact, refusal.rule, refusal.way_out, refusal.about) == (*PARTS, "head")


def test_parts_that_are_empty_leave_no_gap():
    assert str(Refusal("'a.json' is damaged", "", "", about="file")) == "'a.json' is damaged."
    assert (
        str(Refusal("'a.json' is damaged", "", "Fetch it again.", about="file"))
        == "'a.json' is damaged. Fetch it again."
    )


@pytest.mark.parametrize(("kind", "other"), [(UnavailableError, OSError), (MissingPackageError, ImportError)])
def test_it_is_caught_as_what_it_is_and_as_a_refusal(kind, other):
    for caught in (Refusal, ValueError, other):
        with pytest.raises(caught, match="Take it off"):
            raise kind(*PARTS, about="head")


@pytest.mark.parametrize("kind", [Refusal, UnavailableError, MissingPackageError])
def test_it_reaches_another_process_whole(kind):
    again = pickle.loads(pickle.dumps(kind(*PARTS, about="head")))
    assert type(again) is kind
    assert (str(again), again.about) == (str(kind(*PARTS, about="head")), "head")
