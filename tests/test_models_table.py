"""docs/models.md shows what docs/models.json says that runs saw."""

import models_table
from moe_families import FAMILIES


def test_the_page_has_the_table_of_what_was_seen():
    assert models_table.PART.text().strip() == models_table.table()


def test_every_family_has_a_row_and_only_what_ran_says_more(monkeypatch):
    monkeypatch.setattr(models_table, "_rows", list)
    rows = models_table.table().splitlines()[2:]
    assert len(rows) == len(FAMILIES)
    assert all(row.count("not run") == 1 for row in rows)
