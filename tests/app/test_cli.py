"""The command line as its user meets it: help, one clean line and an exit code for each mistake, Ctrl-C and after."""

import json
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

import probllm.app.comparison as comparison
from probllm.app.cli import app

runner = CliRunner()


def probllm(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments])


def with_files(files):
    return [part for name, path in files.items() for part in (f"--{name}", path)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--help"], "compare"),
        (["-h"], "compare"),
        (["compare", "--help"], "Examples"),
        (["compare", "--help"], "--column"),
        (["--version"], "probllm 0."),
    ],
)
def test_help_helps(arguments, says):
    result = probllm(*arguments)
    assert result.exit_code == 0
    assert says in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compare", "nonsense"], "there is no comparison 'nonsense'; there are: tagging"),
        (["compare", "tagging", "--models", "hmm,bert"], "there is no model 'bert'"),
        (["compare", "tagging", "--train", "x.conllu"], "missing: --dev, --test"),
        (["compare", "--train", "x.conllu"], "say which comparison"),
        (
            ["compare", "tagging", "--train", "no.conllu", "--dev", "no.conllu", "--test", "no.conllu"],
            "no.conllu: No such",
        ),
        (["compare", "tagging", "--seeds", "0"], "--seeds"),
        (["compare", "tagging", "--epochs", "many"], "--epochs"),
        (["compare", "tagging", "--nonsense"], "nonsense"),
        (["nonsense"], "nonsense"),
    ],
)
def test_a_mistake_ends_with_a_message_and_exit_code_2(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    result = probllm(*arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "bad.conll"),
        ("word TAG\nword\n", "bad.conll:2:"),
        ("one X\n\ntwo X extra\n", "bad.conll:3:"),
        ("\n\n\n", "bad.conll"),
    ],
)
def test_a_malformed_file_is_one_line_with_file_and_line(files, tmp_path, text, says):
    files["dev"] = tmp_path / "bad.conll"
    files["dev"].write_text(text)
    result = probllm("compare", "tagging", *with_files(files), "--output", tmp_path / "r", "--folder", tmp_path / "c")
    assert result.exit_code == 2
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_trained(files, tmp_path):
    result = probllm(
        "compare", "tagging", *with_files(files), "--output", files["train"] / "x", "--folder", tmp_path / "c"
    )
    assert result.exit_code == 2
    assert "Not a directory" in result.stderr


def test_compare_prints_the_table_and_writes_the_report(files, tmp_path):
    arguments = ["--models", "hmm,feature-crf", "--epochs", 1, "--output", tmp_path / "r", "--folder", tmp_path / "c"]
    result = probllm("compare", "tagging", *with_files(files), *arguments)
    assert result.exit_code == 0, result.output
    for expected in ("HMM", "feature CRF", "accuracy", "span F1", "index.html"):
        assert expected in result.output
    (document,) = json.loads((tmp_path / "r" / "results.json").read_text())
    assert [row["model"] for row in document["rows"]] == ["HMM", "feature CRF"]
    assert "<svg" in (tmp_path / "r" / "index.html").read_text()


def test_without_a_name_all_comparisons_run(monkeypatch, tmp_path):
    ran = []

    def compare(name, say, **settings):
        ran.append(name)
        return comparison.Outcome(name, "?", "", [], [])

    monkeypatch.setattr(comparison, "COMPARISONS", comparison.COMPARISONS)
    monkeypatch.setattr(comparison, "compare", compare)
    result = probllm("compare", "--output", tmp_path / "r", "--folder", tmp_path / "c")
    assert result.exit_code == 0, result.output
    assert ran == list(comparison.COMPARISONS)


def test_ctrl_c_leaves_a_checkpoint_says_how_to_go_on_and_the_same_command_does(files, tmp_path):
    arguments = ["compare", "tagging", *with_files(files), "--models", "feature-crf", "--epochs", "40"]
    arguments += ["--output", tmp_path / "report", "--folder", tmp_path / "runs"]
    command = [sys.executable, "-m", "probllm", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "runs").rglob("metrics.jsonl")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "probllm compare tagging" in errors
    assert "same command goes on" in errors
    assert list((tmp_path / "runs").rglob("checkpoint.safetensors"))
    result = probllm(*arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "report" / "index.html").exists()
