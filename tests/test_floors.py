"""The package's floors: a file imports from lower floors or from its own folder, never upward, never from a sibling
room.

The imports are read from the source, so that one inside a function, a relative one and one for the type checker count
too.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FLOORS = {
    "math": 1,
    "data": 1,
    "nn": 2,
    "distributions": 2,
    "graphs": 2,
    "objectives": 3,
    "decoding": 3,
    "models": 4,
    "evaluation": 4,
    "training": 5,
    "inference": 6,
    "app": 7,
}
FACE = 8  # probllm/__init__.py and __main__.py stand above all rooms
PACKAGE = Path(__file__).parents[1] / "probllm"
SOURCES = sorted(PACKAGE.rglob("*.py"))
NAMES_THAT_SAY_NOTHING = {"util", "utils", "helper", "helpers", "common", "misc"}


def imported(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Each module of ours that ``source`` imports, with its line; ``module`` is its own dotted name, for relative
    imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            # "from probllm import models" imports a room; "from probllm import fit" imports the face
            names = (
                [f"probllm.{a.name}" if a.name in FLOORS else base for a in node.names] if base == "probllm" else [base]
            )
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "probllm":
                yield node.lineno, name


def violations(source: str, path: Path) -> list[str]:
    """What in ``source``, the text of ``path`` (relative to the package), breaks the rule."""
    is_package = path.name == "__init__.py"
    parts = ["probllm", *path.parent.parts, *([] if is_package else [path.stem])]
    room = path.parts[0] if len(path.parts) > 1 else None
    if room is None:
        return []
    if room not in FLOORS:
        return [f"{path}: the room {room!r} has no floor"]
    broken = []
    for line, name in imported(source, ".".join(parts), is_package):
        there = name.split(".")[1] if "." in name else None
        if there == room:
            continue
        floor = FACE if there is None else FLOORS.get(there, FACE)
        if floor >= FLOORS[room]:
            broken.append(f"{path}:{line}: {room} (floor {FLOORS[room]}) imports {name} (floor {floor})")
    return broken


def test_no_file_imports_upward_or_sideways():
    broken = [v for path in SOURCES for v in violations(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE))]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("math/chain.py", "from probllm.nn import Encoder"),
        ("math/chain.py", "def f():\n    import probllm.app.cli"),
        ("math/kernels/chain.py", "from ...models import crf_tagger"),
        ("math/chain.py", "from ..data import Dataset"),
        ("nn/encoder.py", "from probllm.distributions.linear_chain import LinearChainCRF"),
        ("nn/__init__.py", "from ..distributions import LinearChainCRF"),
        ("models/model.py", "from probllm import evaluation"),
        ("models/model.py", "from probllm import fit"),
        ("models/model.py", "from .. import training"),
        ("models/model.py", "import probllm"),
        (
            "training/fit.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from probllm.inference import Laplace",
        ),
        ("training/fit.py", "import importlib\nimportlib.import_module('probllm.app.cli')"),
        ("evaluation/plots.py", "from probllm.models.model import Model"),
        ("attic/x.py", ""),
    ],
)
def test_the_check_catches(path, source):
    assert len(violations(source, Path(path))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("math/chain.py", "from probllm.math.kernels import chain"),
        ("math/kernels/chain.py", "from ..semirings import log_sum"),
        ("models/crf_tagger.py", "from probllm.nn import Encoder\nfrom . import model\nfrom ..math import chain"),
        ("models/crf_tagger.py", "from probllm import nn"),
        ("app/cli.py", "import torch, probllm.training\nfrom probllm.models import CRFTagger"),
        ("__init__.py", "from probllm.training import fit"),
    ],
)
def test_the_check_allows(path, source):
    assert violations(source, Path(path)) == []


def test_every_name_says_what_is_inside():
    names = [
        path
        for path in SOURCES
        if {part.strip("_").removesuffix(".py") for part in path.relative_to(PACKAGE).parts} & NAMES_THAT_SAY_NOTHING
    ]
    assert not names


def test_importing_the_face_stays_light():
    heavy = ("arviz", "matplotlib", "pandas", "PIL", "sklearn", "transformers", "typer")
    code = f"import sys, probllm; print([m for m in {heavy} if m in sys.modules], probllm.__version__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.startswith("[] ")


def test_the_face_has_all_that_it_names():
    import probllm

    for name in probllm.__all__:
        assert getattr(probllm, name) is not None
        assert name in dir(probllm)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = probllm.nonsense
