"""Tables of captioned pictures are read row by row; a fault names its file and line."""

import gzip

import numpy as np
import pytest
import torch

from probllm.data import load_image, read_captioned_images

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def folder(tmp_path):
    pixels = np.zeros((6, 10, 3), dtype=np.uint8)
    pixels[:, :5, 0] = 255  # red on the left
    (tmp_path / "pictures").mkdir()
    Image.fromarray(pixels).save(tmp_path / "pictures" / "a.png")
    Image.fromarray(pixels[:, :, 0]).save(tmp_path / "b.png")
    return tmp_path


CSV = 'id,file_name,caption\n1,pictures/a.png,"red, on\nthe left"\n2,b.png, grey \n\n3,b.png,again\n'
JSONL = '{"image": "pictures/a.png", "text": "red, on\\nthe left"}\n{"image": "b.png", "text": "grey"}\n\n'


@pytest.mark.parametrize("name", ["captions.csv", "metadata.jsonl", "captions.csv.gz", "metadata.jsonl.gz"])
def test_rows_of_either_table_are_pictures_with_captions(folder, name):
    content = (CSV if "csv" in name else JSONL).encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    rows = read_captioned_images(folder)
    assert rows == read_captioned_images(folder / name)
    assert rows[:2] == [(folder / "pictures/a.png", "red, on\nthe left"), (folder / "b.png", "grey")]
    assert len(rows) == (3 if "csv" in name else 2)


def test_pictures_become_tensors_from_zero_to_one(folder):
    picture = load_image(folder / "pictures" / "a.png")
    assert picture.shape == (3, 6, 10)
    assert picture.dtype == torch.float32
    assert picture[0, :, :5].eq(1).all()
    assert picture[0, :, 5:].eq(0).all()
    assert load_image(folder / "b.png", size=4).shape == (3, 4, 4)
    assert load_image(folder / "b.png", mode="L").shape == (1, 6, 10)
    assert load_image(folder / "b.png", mode="RGBA")[3].eq(1).all()


def test_a_turn_beside_the_pixels_is_applied(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by a quarter
    with Image.open(folder / "b.png") as picture:
        picture.convert("RGB").save(folder / "turned.png", exif=exif)
    assert torch.equal(load_image(folder / "turned.png"), load_image(folder / "b.png").rot90(-1, (1, 2)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.csv", "", "captions.csv: the file is empty"),
        ("captions.csv", "file_name,caption\n", "captions.csv: the table has no rows"),
        (
            "captions.csv",
            "file_name,caption\nb.png,x\nb.png\n",
            "csv:3: expected 2 columns as in the header, got 1",
        ),
        ("captions.csv", "file_name,caption\nb.png,\n", "captions.csv:2: expected a text under caption or text"),
        ("captions.csv", "picture,caption\nb.png,x\n", "captions.csv:2: expected a text under file_name or image"),
        ("captions.csv", 'file_name,caption\nb.png,"x\ny"\nc.png,x\n', "captions.csv:4: there is no picture .*c.png"),
        ("captions.csv", 'file_name,caption\nb.png,"x\n', "captions.csv:2: unexpected end of data"),
        ("captions.jsonl", '{"image": "b.png", "text": "x"}\n{"image"\n', "captions.jsonl:2: not JSON"),
        ("captions.jsonl", "[1]\n", "captions.jsonl:1: expected a JSON object"),
        (
            "captions.jsonl",
            '{"image": "b.png", "text": 3}\n',
            "jsonl:1: expected a text under caption or text",
        ),
        ("captions.jsonl", '{"image": "", "text": "x"}\n', "captions.jsonl:1: expected a text under file_name"),
        ("captions.txt", "b.png x\n", "captions.txt: expected a table ending in .csv or .jsonl"),
    ],
)
def test_a_malformed_row_is_reported_with_file_and_line(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_captioned_images(folder / name)


def test_a_folder_without_a_table_and_a_file_that_is_no_picture_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"the folder holds none of captions.csv"):
        read_captioned_images(folder)
    (folder / "c.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"c.png: not a picture"):
        load_image(folder / "c.png")
    with pytest.raises(ValueError, match="mode must be one of RGB, L, RGBA, got 'CMYK'"):
        load_image(folder / "b.png", mode="CMYK")
