"""Every mutant can be made of the sources as they are; `make faults-mutants` runs them."""

import compileall
import shutil
from pathlib import Path

import pytest

from bench.faults.faults import FAULTS
from bench.faults.mutants import MUTANTS, Broken, Mutant, Patch, apply
from bench.subjects import ROOT


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_made_of_the_sources(name: str, tmp_path: Path):
    mutant = MUTANTS[name]
    for patch in mutant.patches:
        (tmp_path / patch.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / patch.file, tmp_path / patch.file)
    apply(mutant, tmp_path)
    assert compileall.compile_dir(tmp_path, quiet=2)
    for patch in mutant.patches:
        assert (tmp_path / patch.file).read_text() != (ROOT / patch.file).read_text()
    assert any(mutant.only in fault for fault in FAULTS)


@pytest.mark.parametrize("text", ["", "safe safe"])
def test_a_text_that_is_not_there_once_is_an_error(text: str, tmp_path: Path):
    (tmp_path / "code.py").write_text(text)
    with pytest.raises(Broken):
        apply(Mutant((Patch("code.py", "safe", ""),), only=""), tmp_path)
