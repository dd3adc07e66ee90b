"""The cache of compiled kernels: used, and not used once any kernel's source changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from probllm.math.kernels import compiled


def test_a_change_in_any_kernel_changes_the_key_of_every_cached_function(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core.registry import cpu_target

    from probllm.math.kernels.chain_scaled import some_tiny

    codegen = cpu_target.target_context.codegen()
    before = some_tiny._cache._index_key("signature", codegen)
    assert before == some_tiny._cache._index_key("signature", codegen)
    monkeypatch.setattr(compiled, "SOURCES", "other sources")
    assert before != some_tiny._cache._index_key("signature", codegen)


def test_digest_sees_every_file_by_name_and_text(tmp_path: Path) -> None:
    seen = set()
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.py", "2"), ("a.py", "1")):
        (tmp_path / name).write_text(text)
        seen.add(compiled.digest(tmp_path))
    assert len(seen) == 4


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    code = (
        "import numpy as np\n"
        "from probllm.math.kernels.chain_scaled import some_tiny\n"
        "some_tiny(np.zeros(3), 3)\n"
        "print(sum(some_tiny.stats.cache_hits.values()))"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    hits = [
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    ]
    assert [int(h) for h in hits] == [0, 1]
