"""The tests' own test: every planted fault of `tests.support.mutations` must make the tests named beside it fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mutations import MUTATIONS, Mutation
from tests.support.paths import ROOT

COPIED = ("dvi", "trainers", "tests", "configs", "pyproject.toml")
TESTS_FAILED = 1  # pytest's exit code; an error at collection would be another


def test_every_planted_fault_still_fits_the_code():
    """A fault whose text is gone plants nothing."""
    assert len(MUTATIONS) >= 25
    for mutation in MUTATIONS:
        assert (ROOT / mutation.file).read_text().count(mutation.old) == 1, mutation.name
        assert mutation.old != mutation.new
        assert (ROOT / mutation.tests.split("::")[0]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.name for mutation in MUTATIONS])
def test_a_planted_fault_is_found(mutation: Mutation, tmp_path: Path):
    """A fault that survives shows a property that no test holds."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    target = tmp_path / mutation.file
    target.write_text(target.read_text().replace(mutation.old, mutation.new))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", mutation.tests]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == TESTS_FAILED, f"{mutation.name} survived {mutation.tests}:\n{result.stdout[-2000:]}"
