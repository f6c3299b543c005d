from ultrafuser.card import ROOT, with_tables


def test_the_model_cards_tables_are_those_of_the_result_files():
    card = (ROOT / "MODEL_CARD.md").read_text()
    assert with_tables(card) == card, "Run `python -m ultrafuser.card`."
