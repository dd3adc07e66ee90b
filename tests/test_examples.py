"""Every example runs from top to bottom at its small setting and ends in a table or a picture."""

import os
import re
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


def code_blocks(name):
    text = (Path(__file__).parents[1] / name).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_readmes_snippets_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = code_blocks("README.md")
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "['" in capsys.readouterr().out  # the tags of two words
    assert (tmp_path / "stress-tagger" / "config.json").exists()


def test_both_readmes_show_the_same_code_and_commands():
    def bare(name):
        return [re.sub(r"\s*#.*", "", block) for block in code_blocks(name)]

    assert bare("README.md") == bare("README.zh.md")
    for name in ("README.md", "README.zh.md"):
        text = (Path(__file__).parents[1] / name).read_text(encoding="utf-8")
        assert "make compare" in text
        assert "make test" in text


def test_links_in_the_documents_lead_somewhere():
    root = Path(__file__).parents[1]
    for path in [*root.glob("*.md"), *root.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert "://" in target or (path.parent / target).exists(), f"{path.name}: {target}"


def test_code_that_the_documents_name_exists():
    root = Path(__file__).parents[1]
    for path in root.glob("docs/*.md"):
        for name in re.findall(r"`((?:probllm|examples|tests)/[\w/]+\.py)`", path.read_text(encoding="utf-8")):
            assert (root / name).exists(), f"{path.name}: {name}"
