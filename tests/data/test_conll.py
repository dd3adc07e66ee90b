"""Column files come back as written; a malformed row names its file and line; real treebanks have their counts."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probllm.data import TreebankSentence, read_conll, read_conllu, read_tagged, write_conll, write_conllu

cell = st.text(st.characters(exclude_characters="\n\r\t\ufeff", exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: bool(text.strip()) and text != "-DOCSTART-"
)
tag = st.from_regex(r"\A[A-Z]+(-[a-z]+)?\Z")
sentences_strategy = st.lists(st.lists(st.tuples(cell, tag), min_size=1, max_size=5), min_size=1, max_size=5)

CONLLU = """\
# sent_id = 1
# text = vámonos al mar
1-2\tvámonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tvamos\tir\tVERB\tV\tMood=Imp\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\tP\t_\t1\tobj\t_\t_
3-4\tal\t_\t_\t_\t_\t_\t_\t_\t_
3\ta\ta\tADP\tE\t_\t5\tcase\t_\t_
4\tel\tel\tDET\tD\t_\t5\tdet\t_\t_
4.1\tgran\tgran\tADJ\tA\t_\t_\t_\t5:amod\t_
5\tmar\tmar\tNOUN\tN\t_\t1\tobl\t_\t_

1\t10 000\t10 000\tNUM\tZ\t_\t0\troot\t_\t_
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("conll")


@given(sentences_strategy)
def test_two_columns_come_back_as_written(folder, rows):
    sentences = [([word for word, _ in sentence], [tag for _, tag in sentence]) for sentence in rows]
    write_conll(folder / "a.conll", sentences)
    assert read_conll(folder / "a.conll") == sentences
    assert read_tagged(folder / "a.conll") == sentences


def test_words_of_conllu_skip_ranges_and_empty_nodes(tmp_path):
    path = tmp_path / "a.conllu"
    path.write_text(CONLLU, encoding="utf-8")
    first, second = read_conllu(path)
    assert first.words == ["vamos", "nos", "a", "el", "mar"]
    assert first.heads == [0, 1, 5, 5, 1]
    assert first.relations == ["root", "obj", "case", "det", "obl"]
    assert first.lemmas[0] == "ir"
    assert first.comments == ["sent_id = 1", "text = vámonos al mar"]
    assert second.words == ["10 000"]
    for column, tags in (("upos", "VERB"), ("xpos", "V"), ("feats", "Mood=Imp"), ("deprel", "root"), ("lemma", "ir")):
        assert read_tagged(path, column)[0].tags[0] == tags
    assert read_tagged(path) == read_tagged(path, "upos")


@pytest.mark.parametrize("name", ["a.conllu", "a.conllu.txt", "a.txt"])
def test_conllu_is_known_by_its_name_or_its_first_row(tmp_path, name):
    (tmp_path / name).write_text(CONLLU, encoding="utf-8")
    assert read_tagged(tmp_path / name)[1] == (["10 000"], ["NUM"])


@pytest.mark.parametrize("separator", ["\t", " ", "   "])
def test_columns_are_cut_at_tabs_or_spaces_and_counted_from_either_end(tmp_path, separator):
    rows = [["-DOCSTART-", "-X-", "O", "O"], [], ["#", "SYM", "I-NP", "O"], ["U.N.", "NNP", "I-NP", "B-ORG"], []]
    path = tmp_path / "eng.testb"
    path.write_text("\r\n".join(separator.join(row) for row in rows))
    assert read_tagged(path) == [(["#", "U.N."], ["O", "B-ORG"])]
    assert read_tagged(path, 1) == [(["#", "U.N."], ["SYM", "NNP"])]
    assert read_tagged(path, -2) == [(["#", "U.N."], ["I-NP", "I-NP"])]


def row(*changes):
    cells = ["1", "word", "word", "NOUN", "NN", "_", "0", "root", "_", "_"]
    for index, value in changes:
        cells[index] = value
    return "\t".join(cells)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        ("# only = comments\n", "no sentence in the file"),
        (row() + "\n2\ttwo\n", r":2: expected 10 tab-separated columns, got 2: '2\\ttwo'"),
        (row().replace("\t", " "), ":1: expected 10 tab-separated columns, got 1"),
        (row((3, "")), ":1: the column upos is empty"),
        ("\n" + row((0, "2")), ":2: expected word 1, got the number '2'"),
        (row() + "\n" + row(), ":2: expected word 2, got the number '1'"),
        (row((0, "x")), ":1: expected word 1, got the number 'x'"),
        (row((0, "2-3")), ":1: the range 2-3 does not begin at word 1"),
        (row((6, "x")), ":1: head must be a number or _, got 'x'"),
        (row((6, "-1")), ":1: head must be a number or _, got '-1'"),
        (row((6, "2")), ":1: head must be another word from 1 to 1 or 0, got 2"),
        (row((6, "1")), ":1: head must be another word from 1 to 1 or 0, got 1"),
        (row((0, "1.1")), ":1: a sentence without words"),
        (row((3, "_")), "no word has a value in the column 'upos'"),
    ],
)
def test_a_malformed_conllu_row_is_reported_with_file_and_line(tmp_path, content, message):
    path = tmp_path / "bad.conllu"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"bad\.conllu{'' if message.startswith(':') else ': '}{message}"):
        read_tagged(path)


@pytest.mark.parametrize(
    ("content", "column", "message"),
    [
        ("", -1, "the file is empty"),
        ("-DOCSTART- O\n", -1, "no sentence in the file"),
        ("word\tO\nword\n", -1, ":2: expected a word and its tag, got 'word'"),
        ("word\tO\n\nword\tNN\tO\n", -1, ":3: expected 2 columns as above, got 3"),
        ("word\t\n", -1, r":1: expected a word and its tag, got 'word\\t'"),
        ("\tO\n", -1, r":1: expected a word and its tag, got '\\tO'"),
        ("word\tO\n", 2, ":1: there is no column 2 among 2"),
        ("word\tO\n", -3, ":1: there is no column -3 among 2"),
        ("word\tO\n", "upos", "column must be a number in a file of columns, got 'upos'"),
    ],
)
def test_a_malformed_column_row_is_reported_with_file_and_line(tmp_path, content, column, message):
    path = tmp_path / "bad.conll"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"bad\.conll{'' if message.startswith(':') else ': '}{message}"):
        read_tagged(path, column)


@pytest.mark.parametrize("ending", [b"\r", b"\r\r\n"])
def test_carriage_returns_within_a_line_are_refused_not_read_as_part_of_a_tag(tmp_path, ending):
    path = tmp_path / "old.conll"
    path.write_bytes(ending.join([b"the\tD", b"dog\tN", b"", b""]))
    with pytest.raises(ValueError, match=r"old.conll:1: a carriage return within the line"):
        read_tagged(path)


def test_an_unknown_column_and_a_byte_that_is_not_utf8_are_named(tmp_path):
    path = tmp_path / "a.conllu"
    path.write_bytes(row().encode() + b"\n2\tcaf\xe9\n")
    with pytest.raises(ValueError, match=r"a.conllu:2: not UTF-8"):
        read_tagged(path)
    with pytest.raises(ValueError, match="column must be one of upos, xpos, feats, deprel, lemma"):
        read_tagged(path, "tag")


@pytest.mark.parametrize("pair", [("a\tb", "O"), ("a", "O\n"), (" ", "O"), ("a", "")])
def test_what_two_columns_cannot_hold_is_not_written(tmp_path, pair):
    with pytest.raises(ValueError, match="that two columns cannot hold"):
        write_conll(tmp_path / "a", [([pair[0]], [pair[1]])])


@pytest.mark.corpus
def test_english_web_treebank_has_its_published_counts(corpora):
    for part, count, words in (("train", 12544, 204577), ("dev", 2001, 25147), ("test", 2077, 25094)):
        sentences = read_conllu(corpora / "ud_english_ewt" / f"{part}.conllu.gz")
        assert (len(sentences), sum(map(len, sentences))) == (count, words)
        assert all(sentence.heads.count(0) == 1 for sentence in sentences)
        assert len({tag for sentence in sentences for tag in sentence.upos}) == 17
        if part == "dev":
            assert sentences[0].words == ["From", "the", "AP", "comes", "this", "story", ":"]
            assert sentences[0].upos == ["ADP", "DET", "PROPN", "VERB", "DET", "NOUN", "PUNCT"]


@pytest.mark.corpus
def test_wnut17_has_its_published_counts(corpora):
    for part, count, entities in (("train", 3394, 1975), ("dev", 1009, 836), ("test", 1287, 1079)):
        sentences = read_tagged(corpora / "wnut17" / f"{part}.conll.gz")
        tags = Counter(tag[:2] for sentence in sentences for tag in sentence.tags)
        assert (len(sentences), tags["B-"]) == (count, entities)


def test_trees_come_back_as_written(tmp_path):
    path = tmp_path / "a.conllu"
    path.write_text(CONLLU, encoding="utf-8")
    sentences = read_conllu(path, trees=True)
    write_conllu(tmp_path / "b.conllu", sentences)
    assert read_conllu(tmp_path / "b.conllu", trees=True) == sentences


def test_what_is_not_annotated_is_written_as_underscores(tmp_path):
    write_conllu(tmp_path / "a.conllu", [TreebankSentence(["to", "be"], heads=[-1, 1])])
    assert (tmp_path / "a.conllu").read_text() == ("1\tto\t_\t_\t_\t_\t_\t_\t_\t_\n2\tbe\t_\t_\t_\t_\t1\t_\t_\t_\n\n")


@pytest.mark.parametrize(
    ("sentence", "message"),
    [
        (TreebankSentence(["a", "b"], heads=[0]), "sentence 1 has 2 words but columns of"),
        (TreebankSentence(["a\tb"]), "sentence 1 has a word that tab-separated columns cannot hold"),
        (TreebankSentence([""]), "cannot hold"),
    ],
)
def test_what_conllu_cannot_hold_is_not_written(tmp_path, sentence, message):
    with pytest.raises(ValueError, match=message):
        write_conllu(tmp_path / "a.conllu", [sentence])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(), row((0, "2"), (6, "3")), row((0, "3"), (6, "2"))], ":2: the heads form a cycle, 2 -> 3 -> 2"),
        ([row((6, "2")), row((0, "2"), (6, "1"))], ":1: the heads form a cycle, 1 -> 2 -> 1"),
        ([row(), row((0, "2"), (6, "_"))], ":2: the word has no head"),
        ([row((7, "_"))], ":1: the word has no relation"),
    ],
)
def test_what_is_no_tree_is_reported_with_file_and_line_where_trees_are_wanted(tmp_path, rows, message):
    path = tmp_path / "bad.conllu"
    path.write_text("\n".join(rows))
    read_conllu(path)
    with pytest.raises(ValueError, match=rf"bad\.conllu{message}"):
        read_conllu(path, trees=True)
