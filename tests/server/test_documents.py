"""What the documents say of the code is what the code says."""

from pathlib import Path

import pytest

from server.documents import DOCUMENTS, TABLES, fill

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_tables_of_a_document_are_those_of_the_code(name: str):
    text = (ROOT / name).read_text("utf-8")
    assert fill(text) == text, "make docs"


def test_every_table_stands_in_a_document():
    texts = "".join((ROOT / name).read_text("utf-8") for name in DOCUMENTS)
    for name in TABLES:
        assert f"<!-- {name} -->\n|" in texts
