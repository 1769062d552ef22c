"""docs/reliability.md shows what docs/reliability.json says that runs saw."""

import faults_table


def test_the_page_has_the_table_of_what_was_seen():
    assert faults_table.PART.text().strip() == faults_table.table()
