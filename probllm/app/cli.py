"""The command line: ``probllm compare`` trains models side by side and writes what they are worth into a report."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probllm.app import comparison
from probllm.app.comparison import COMPARISONS, InputError, Outcome

if TYPE_CHECKING:
    from rich.console import Console

BAD_INPUT, INTERRUPTED = 2, 130

app = typer.Typer(
    name="probllm",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool) -> None:
    """Print the version and leave, if that is wanted."""
    if wanted:
        from importlib.metadata import version

        typer.echo(f"probllm {version('probllm')}")
        raise typer.Exit


@app.callback(epilog="Begin with `probllm compare`; `probllm compare --help` has examples.")
def probllm(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=print_version)
    ] = False,
) -> None:
    """Probabilistic and generative models for language and images, side by side on your data or on what comes along."""


@app.command(
    epilog="""Examples:

- `probllm compare`: everything on embedded data, a few minutes on two cores

- `probllm compare tagging --models hmm,transformer-crf --seeds 3`

- `probllm compare tagging --train train.conllu --dev dev.conllu --test test.conllu --column xpos`

- `probllm compare parsing --train train.conllu --dev dev.conllu --test test.conllu --models bilstm-spanning`

- `probllm compare translation --train train.en --dev dev.en --test test.en --target de`

- `probllm compare tagging --train train.bio --dev dev.bio --test test.bio --full`
"""
)
def compare(
    name: Annotated[
        str | None, typer.Argument(help=f"Which comparison: {', '.join(COMPARISONS)}. Without it, all of them.")
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Sentences to train on: CoNLL-U, or a word and its tag a line; plain or .gz."
        ),
    ] = None,
    dev: Annotated[Path | None, typer.Option(metavar="FILE", help="Sentences that choose the best epoch.")] = None,
    test: Annotated[Path | None, typer.Option(metavar="FILE", help="Sentences that the table is measured on.")] = None,
    column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Which column holds the tags. CoNLL-U: upos, xpos, feats or deprel; else a number, from 0, or from "
            "the end with -1.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="SUFFIX",
            help="For translation: what the names of the translations end with. With de, train.en is translated as in "
            "train.de.",
        ),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Only these models; a name that does not exist lists those that do."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(metavar="N", min=1, help="Train each model so many times.")] = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", min=1, help="Passes over the training data.")] = None,
    small: Annotated[
        bool, typer.Option("--small/--full", help="A few minutes on two cores, or all models, all data, three seeds.")
    ] = True,
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where index.html and results.json are written.")
    ] = Path("report"),
    folder: Annotated[Path, typer.Option(metavar="FOLDER", help="Where checkpoints lie.")] = Path("runs"),
) -> None:
    """Train several models on the same data and compare them in one table with uncertainty.

    Prints the table and writes a report with pictures. Ctrl-C keeps what was trained: the same command goes on from
    there.
    """
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a file or a pipe has no margin to respect
    if name is None and (train or dev or test or models):
        fail(f"say which comparison the files or models are for: {', '.join(COMPARISONS)}")
    for place in (output, folder):
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"{place}: {error.strerror or error}")
    outcomes: list[Outcome] = []
    try:
        for each in [name] if name is not None else COMPARISONS:
            outcome = comparison.compare(
                each,
                lambda line: console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True),
                train=train,
                dev=dev,
                test=test,
                column=column,
                target=target,
                models=tuple(models.replace(",", " ").split()) if models else (),
                seeds=seeds,
                epochs=epochs,
                small=small,
                folder=folder,
            )
            outcomes.append(outcome)
            show(outcomes, output, console)
    except InputError as error:
        fail(str(error))
    except KeyboardInterrupt:
        again = shlex.join(["probllm", *sys.argv[1:]])
        typer.echo(f"\nInterrupted. The checkpoints lie in {folder}; the same command goes on from there:", err=True)
        typer.echo(f"    {again}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def show(outcomes: list[Outcome], output: Path, console: Console) -> None:
    """Print the newest table and write the report so far, so that what fails later does not take it along."""
    from probllm.app.report import print_table, write_html, write_json

    print_table(outcomes[-1], console)
    write_json(outcomes, output / "results.json")
    write_html(outcomes, output / "index.html")
    console.print(f"Report: {output / 'index.html'}", markup=False, highlight=False, soft_wrap=True)


def fail(message: str) -> None:
    """One clean line on standard error, and the exit code for input that cannot be used."""
    typer.echo(f"probllm: {' '.join(message.split())}", err=True)
    raise typer.Exit(BAD_INPUT)


def main() -> None:
    """What the ``probllm`` command runs."""
    # Read when torch is loaded: waiting threads sleep, since many small products stall on a busy machine if they spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
