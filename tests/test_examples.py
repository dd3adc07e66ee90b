"""Every example runs from top to bottom at its small setting and ends in a table or a picture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_shows_what_it_found(path, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    result = subprocess.run(
        [sys.executable, path, "--small"], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "┃" in result.stdout or list(tmp_path.glob("*.svg"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short_and_opens_with_its_question(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < 100
    assert text.splitlines()[0].startswith('"""')
    assert text.splitlines()[0].endswith("?")
