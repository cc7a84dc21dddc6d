"""Text is read by its byte order mark and JSON by its shape, the same wherever a file is cut."""

import codecs
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.corpus.compression import Damaged
from pipeline.corpus.recoding import _json_rows
from tests.pipeline.corpus.tiny_corpus import COMPRESS, TEXTS, documents, files, jsonl, pairs

ENCODINGS = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("slice_bytes", [101, 10**6])
def test_text_with_a_byte_order_mark_is_read_by_it(
    tmp_path: Path, encoding: str, ending: str, slice_bytes: int
) -> None:
    def marked(text: str) -> bytes:
        return COMPRESS[ending](ENCODINGS[encoding] + text.encode(encoding))

    blocks = [text.replace("\r\n", "\n").strip() for text in TEXTS]
    path = tmp_path / f"x.txt{ending}"
    path.write_bytes(marked(TEXTS[2] + "😀"))
    assert pairs(files(path), slice_bytes) == [(TEXTS[2] + "😀", "")]
    path.write_bytes(marked("\n\n".join(blocks)))
    assert documents(files(path, split_text="blank-lines"), slice_bytes) == blocks
    lines = tmp_path / f"x.jsonl{ending}"
    lines.write_bytes(marked(jsonl(TEXTS).decode()))
    assert documents(files(lines), slice_bytes) == TEXTS


@pytest.mark.parametrize("encoding", [each for each in ENCODINGS if each != "utf-8"])
def test_latin_text_of_two_or_four_bytes_a_character_needs_no_mark(tmp_path: Path, encoding: str) -> None:
    text = "Grüße aus Łódź, und ein zweiter Satz.\n"
    (tmp_path / "x.txt").write_bytes(text.encode(encoding))
    assert pairs(files(tmp_path / "x.txt")) == [(text, "")]
    (tmp_path / "x.jsonl").write_bytes(jsonl([text, "plain"]).decode().encode(encoding))
    assert documents(files(tmp_path / "x.jsonl")) == [text, "plain"]
    (tmp_path / "few.txt").write_bytes(b"some text with\0a NUL or\0\0two, as UTF-8")
    assert pairs(files(tmp_path / "few.txt")) == [("some text with\0a NUL or\0\0two, as UTF-8", "")]


def test_half_a_character_follows_the_policy_and_half_a_unit_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(codecs.BOM_UTF16_LE + '{"text": "a\ud800b"}\n'.encode("utf-16-le", "surrogatepass"))
    assert pairs(files(path, invalid_text="skip")) == [(None, "invalid UTF-8")]
    assert pairs(files(path))[0][1] == "replaced UTF-8"
    path.write_bytes(codecs.BOM_UTF16_LE + '{"text": "a"}\n'.encode("utf-16-le")[:-1])
    with pytest.raises(ValueError, match=r"x\.jsonl is damaged \(its UTF-16 is cut or wrong"):
        pairs(files(path))
    text = tmp_path / "x.txt"
    text.write_bytes(codecs.BOM_UTF16_LE + b"a\0b")
    with pytest.raises(ValueError, match=r"x\.txt is not valid UTF-16 at its byte 4"):
        pairs(files(text, invalid_text="fail"))


ROWS = [{"text": text, "tags": ["[", "]}", '"', "\\"], "of": {"deep": [1, {"x": 2}]}} for text in TEXTS]


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("slice_bytes", [60, 1000, 10**6])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_is_its_rows_however_it_is_cut(
    tmp_path: Path, ending: str, slice_bytes: int, indent: int | None
) -> None:
    path = tmp_path / f"x.json{ending}"
    path.write_bytes(COMPRESS[ending](json.dumps(ROWS, indent=indent).encode()))
    assert documents(files(path), slice_bytes) == TEXTS


def test_a_json_file_of_one_object_over_many_lines_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"text": "a\nb"}, indent=2))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"version": {"major": 1}}, indent=2))
    (tmp_path / "lines.json").write_bytes(jsonl(["c", "d"]))
    assert pairs(files(tmp_path)) == [("a\nb", ""), (None, "no text"), ("c", ""), ("d", "")]


def test_a_json_array_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"body": "a"}, {"body": "b"}]')
    with pytest.raises(ValueError, match="no column 'text'; it has body"):
        pairs(files(tmp_path))


def test_a_json_array_is_damaged_wherever_it_is_cut(tmp_path: Path) -> None:
    content = json.dumps(ROWS[:4]).encode()
    for size in range(1, len(content), 3):
        (tmp_path / "x.json").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"x\.json is damaged"):
            pairs(files(tmp_path))


def in_blocks(content: bytes, size: int) -> Iterator[bytes]:
    return (content[start : start + size] for start in range(0, len(content), size))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_rows_of_json_do_not_depend_on_the_blocks_they_come_in(size: int) -> None:
    generator = random.Random(size)
    for _ in range(100):
        rows = [random_value(generator) for _ in range(generator.randrange(5))]
        content = json.dumps(rows, indent=generator.choice([None, 2])).encode()
        assert [json.loads(row) for row in _json_rows(in_blocks(content, size))] == rows
    objects = [{"a": "}"}, {"b": ["{"]}]
    content = "\n".join(json.dumps(each, indent=2) for each in objects).encode()
    assert [json.loads(row) for row in _json_rows(in_blocks(content, size))] == objects
    with pytest.raises(Damaged):
        list(_json_rows(in_blocks(b'[{"a": 1}]]', size)))


def random_value(generator: random.Random, depth: int = 0) -> object:
    kind = generator.randrange(3 if depth > 2 else 5)
    if kind == 3:
        return [random_value(generator, depth + 1) for _ in range(generator.randrange(3))]
    if kind == 4:
        return {random_text(generator): random_value(generator, depth + 1) for _ in range(generator.randrange(3))}
    return [generator.random(), random_text(generator), None][kind]


def random_text(generator: random.Random) -> str:
    return "".join(generator.choices('ab"\\[]{},:\n漢', k=generator.randrange(8)))
