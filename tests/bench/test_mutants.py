"""Every mutant can be made of the sources as they are; `make faults-mutants` runs them."""

import compileall
import shutil
from pathlib import Path

import pytest

from bench.faults.faults import FAULTS
from bench.faults.mutants import MUTANTS
from bench.sources import Broken, Patch, apply, copied
from bench.subjects import ROOT


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_made_of_the_sources(name: str, tmp_path: Path):
    mutant = MUTANTS[name]
    for patch in mutant.patches:
        (tmp_path / patch.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / patch.file, tmp_path / patch.file)
    apply(mutant.patches, tmp_path)
    assert compileall.compile_dir(tmp_path, quiet=2)
    for patch in mutant.patches:
        assert (tmp_path / patch.file).read_text() != (ROOT / patch.file).read_text()
    assert any(mutant.only in fault for fault in FAULTS)


@pytest.mark.parametrize("text", ["", "safe safe"])
def test_a_text_that_is_not_there_once_is_an_error(text: str, tmp_path: Path):
    (tmp_path / "code.py").write_text(text)
    with pytest.raises(Broken):
        apply([Patch("code.py", "safe", "")], tmp_path)


def test_a_copy_has_the_patch_and_is_gone_after_the_block(tmp_path: Path):
    patch = Patch("protocol/cursors.py", "class Cursor(", "class Curse(")
    with copied(["protocol"], [patch], work=tmp_path / "work") as root:
        assert "class Curse(" in (root / patch.file).read_text()
        assert "class Cursor(" in (ROOT / patch.file).read_text()
        assert not list(root.rglob("__pycache__"))
    assert list((tmp_path / "work").iterdir()) == []
