"""Files of lines are read whole, and a fault names its file and line."""

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probllm.data import read_labelled_lines, read_lines, read_parallel_lines, read_text

text_line = st.text(st.characters(exclude_characters="\n\r\ufeff", exclude_categories=["Cs"]), min_size=1).filter(
    lambda line: bool(line.strip())
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lines")


@given(st.lists(text_line, min_size=1), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_lines_come_back_as_written_plain_or_gzip(folder, lines, end, last_end, mark):
    content = (end.join(lines) + end * last_end).encode("utf-8-sig" if mark else "utf-8")
    plain, packed = folder / "a.txt", folder / "a.txt.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    assert read_lines(plain) == read_lines(packed) == lines
    assert read_text(plain) == "\n".join(lines) + "\n" * last_end
    assert read_parallel_lines(plain, packed) == list(zip(lines, lines, strict=True))


@given(st.lists(st.tuples(st.from_regex(r"\A\S+\Z"), text_line), min_size=1))
def test_labelled_lines_split_at_the_first_space(folder, examples):
    examples = [(label.replace("\ufeff", "x"), " ".join(text.split())) for label, text in examples]
    path = folder / "labelled.txt"
    path.write_bytes("".join(f"{label} {text}\n" for label, text in examples).encode())
    assert read_labelled_lines(path) == examples


@pytest.mark.parametrize(
    ("reader", "content", "message"),
    [
        (read_text, b"", r"bad.txt: the file is empty"),
        (read_lines, b"\n \n", r"bad.txt: the file is empty"),
        (read_lines, b"one\n\nthree\n", r"bad.txt:2: expected text, got a blank line"),
        (read_text, b"one\ntw\xff\n", r"bad.txt:2: not UTF-8: invalid start byte b'\\xff' at byte 3"),
        (read_labelled_lines, b"1 fine\n0\n", r"bad.txt:2: expected 'LABEL text', got '0'"),
        (read_labelled_lines, b" text without label\n", r"bad.txt:1: expected 'LABEL text'"),
        (read_labelled_lines, b"1 fine\n\n0 fine\n", r"bad.txt:2: expected 'LABEL text', got ''"),
    ],
)
def test_a_malformed_line_is_reported_with_file_and_line(tmp_path, reader, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        reader(path)


@pytest.mark.parametrize(("first", "second"), [("a\nb\n", "a\n"), ("a\n", "a\nb\n")])
def test_parallel_files_of_unequal_length_are_refused_at_the_first_lone_line(tmp_path, first, second):
    (tmp_path / "a").write_text(first)
    (tmp_path / "b").write_text(second)
    with pytest.raises(ValueError, match=r":2: no line of the other file answers it: 2 lines against 1"):
        read_parallel_lines(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("content", [b"plain text", gzip.compress(b"one\n" * 100)[:-9]])
def test_a_broken_gzip_file_is_named(tmp_path, content):
    (tmp_path / "bad.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad.gz: not a whole gzip file"):
        read_text(tmp_path / "bad.gz")


@pytest.mark.corpus
def test_real_corpora_have_their_published_sizes(corpora):
    labelled = {"sst2": (6920, 872, 1821), "trec": (5452, None, 500)}
    for name, sizes in labelled.items():
        for part, size in zip(("train", "dev", "test"), sizes, strict=True):
            if size is not None:
                assert len(read_labelled_lines(corpora / name / f"{part}.txt.gz")) == size
    assert {x.label for x in read_labelled_lines(corpora / "sst2" / "dev.txt.gz")} == {"0", "1"}
    for part, size in (("train", 29000), ("val", 1014), ("test_2016_flickr", 1000)):
        pairs = read_parallel_lines(*(corpora / "multi30k_en_de" / f"{part}.{x}.gz" for x in ("en", "de")))
        assert len(pairs) == size
    for part, size in (("test_2017_flickr", 1000), ("test_2017_mscoco", 461)):
        assert len(read_parallel_lines(*(corpora / "multi30k_2017" / f"{part}.{x}.gz" for x in ("en", "de")))) == size
    names = read_lines(corpora / "names" / "names.txt.gz")
    assert (len(names), len(set(names))) == (32033, 29494)
    text = read_text(corpora / "tinyshakespeare" / "input.txt.gz")
    assert len(text) == 1115394
    assert text.startswith("First Citizen:\nBefore we proceed")
