"""The Turkish Web Treebank, from the ``turkish-treebanks`` package (Apache 2.0).

4,851 sentences (81,370 nodes) from the web and from wikis. Words stand cut into inflectional groups, each a node of its
own that hangs on the next by the relation ``ig``; one tree in fifteen has crossing arcs. Relations are Stanford
dependencies.
Source: Kayadelen, Öztürel and Bohnet (2020), "A gold standard dependency treebank for Turkish".
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, distribution

from probllm.data.conll import TreebankSentence, read_conllu
from probllm.data.optional import missing_data_package
from probllm.data.splits import Split, random_split

PACKAGE = "turkish-treebanks"


@cache
def turkish_treebank() -> Split[TreebankSentence]:
    """All sentences, 90 / 5 / 5 % in the order of ``numpy.random.default_rng(0).permutation``.

    Raises:
        ImportError: without the ``turkish-treebanks`` package, with the command that installs it.
    """
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError as error:
        raise missing_data_package(PACKAGE) from error
    # Read as files: the package's own reader wants a version of protobuf that others exclude.
    paths = [str(package.locate_file(f"data/{part}.conllu")) for part in ("web", "wiki")]
    return random_split([sentence for path in paths for sentence in read_conllu(path, trees=True)])
