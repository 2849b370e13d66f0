"""Every mutant can be made of the sources as they are; `make load-mutants` runs them."""

import compileall
import shutil
from pathlib import Path

import pytest

from loadtest.local import ROOT
from loadtest.mutants import MUTANTS, Broken, Mutant, Patch, apply
from loadtest.objectives import FILE, read_objectives


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_made_of_the_sources(name: str, tmp_path: Path):
    mutant = MUTANTS[name]
    for patch in mutant.patches:
        (tmp_path / patch.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / patch.file, tmp_path / patch.file)
    apply(mutant, tmp_path, every=10_000)
    assert compileall.compile_dir(tmp_path, quiet=2)
    changed = (tmp_path / mutant.patches[0].file).read_text()
    assert changed != (ROOT / mutant.patches[0].file).read_text()
    assert "EVERY" not in changed


def test_what_a_mutant_must_miss_is_judged():
    judged = {each.figure for each in read_objectives(FILE, "hold")}
    for mutant in MUTANTS.values():
        assert set(mutant.names) <= judged


@pytest.mark.parametrize("text", ["", "safe safe"])
def test_a_text_that_is_not_there_once_is_an_error(text: str, tmp_path: Path):
    (tmp_path / "code.py").write_text(text)
    with pytest.raises(Broken):
        apply(Mutant((Patch("code.py", "safe", ""),), names=()), tmp_path, every=2)
