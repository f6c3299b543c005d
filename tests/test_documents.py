import pytest

from ultrafuser.card import DOCUMENTS, MARKED, ROOT, with_tables


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tables_are_those_of_the_result_files(name):
    text = (ROOT / name).read_text()
    assert MARKED.search(text)
    assert with_tables(text) == text
