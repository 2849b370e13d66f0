"""Every mutant can be made of the sources as they are; `make load-mutants` runs them."""

import compileall
import shutil
from pathlib import Path

import pytest

from bench.sources import apply
from loadtest.local import ROOT
from loadtest.mutants import MUTANTS
from loadtest.objectives import FILE, read_objectives


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_made_of_the_sources(name: str, tmp_path: Path):
    mutant = MUTANTS[name]
    for patch in mutant.patches:
        (tmp_path / patch.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / patch.file, tmp_path / patch.file)
    apply(mutant.one_in(10_000), tmp_path)
    assert compileall.compile_dir(tmp_path, quiet=2)
    changed = (tmp_path / mutant.patches[0].file).read_text()
    assert changed != (ROOT / mutant.patches[0].file).read_text()
    assert "EVERY" not in changed


def test_what_a_mutant_must_miss_is_judged():
    judged = {each.figure for each in read_objectives(FILE, "hold")}
    for mutant in MUTANTS.values():
        assert set(mutant.names) <= judged
