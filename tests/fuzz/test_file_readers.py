"""Readers refuse damaged files by their own error. `scripts/fuzz` looks for others by coverage."""

import random
from pathlib import Path

import pytest
from file_readers import READERS, seeds_of
from mutations import mutated

MUTATIONS = 150


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read(tmp_path: Path, name: str):
    reader = READERS[name]
    for seed in seeds_of(reader):
        path = tmp_path / reader.name
        path.write_bytes(reader.prepared(seed))
        reader.read(path)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused_by_the_readers_own_error(tmp_path: Path, name: str):
    reader, draw = READERS[name], random.Random(0)
    seeds = seeds_of(reader)
    for _ in range(MUTATIONS):
        reader.try_out(mutated(draw.choice(seeds), draw), tmp_path)
