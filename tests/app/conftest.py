"""Small tagged files for the comparison."""

from pathlib import Path

import pytest

from probllm.data import write_conll

NAMES = ["Ada", "Bob", "Eve", "Max", "Zoe"]
VERBS = ["sees", "meets", "calls", "likes"]


def sentences(count, offset):
    """``Ada sees the tall Bob``, again and again with other words, tagged with the entities of BIO."""
    made = []
    for i in range(offset, offset + count):
        words = [NAMES[i % 5], "Smith", VERBS[i % 4], "the", ["tall", "old", "new"][i % 3], NAMES[(i // 2) % 5]][
            i % 2 :
        ]
        tags = ["B-PER", "I-PER", "O", "O", "O", "B-PER"][i % 2 :]
        made.append((words, ["B-PER", *tags[1:]] if i % 2 else tags))
    return made


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """BIO files to train on, to stop by and to test on."""
    paths = {}
    for part, count, offset in (("train", 60, 0), ("dev", 20, 100), ("test", 25, 200)):
        paths[part] = tmp_path / f"{part}.bio"
        write_conll(paths[part], sentences(count, offset))
    return paths
