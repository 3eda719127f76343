"""Reading documents: every kind of file gives the same texts, and every kind of damage gives one clear line."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from common.data.blocks import BadRecords
from common.data.documents import expand_files, read_documents
from common.errors import UserError

TEXTS = ["The first document.", "A second one, with an ümlaut.", "The third: 数学."]
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def read(path, column="text", separator="line", max_bad_records=0):
    return list(read_documents(expand_files(str(path)), column, separator, BadRecords(max_bad_records)))


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def error_of(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        read(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


CONTENTS = {
    ".txt": "\n\n".join(TEXTS) + "\r\n",
    ".jsonl": "\n".join(json.dumps({"id": 1, "text": text}) for text in TEXTS),
    ".json": json.dumps([{"text": text} for text in TEXTS], indent=1),
}


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("compression", ["", *COMPRESS])
def test_every_kind_gives_the_same_documents(tmp_path, kind, compression):
    content = CONTENTS[kind].encode()
    path = write(tmp_path / f"a{kind}{compression}", COMPRESS.get(compression, bytes)(content))
    assert read(path) == TEXTS


def test_json_may_hold_json_lines(tmp_path):
    assert read(write(tmp_path / "a.json", "\n" + CONTENTS[".jsonl"])) == TEXTS


def test_parquet(tmp_path):
    table = pyarrow.table({"n": range(3), "body": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path / "a.parquet", column="body") == TEXTS
    message = error_of(tmp_path / "a.parquet")
    assert "a.parquet" in message and "body, n" in message and "--text_column" in message


@pytest.mark.parametrize(
    ("separator", "documents"),
    [
        ("line", ["a", "b", "c", "<end> d", "e"]),
        ("blank_line", ["a\nb", "c\n<end> d\ne"]),
        ("file", ["a\nb\n\nc\n<end> d\ne"]),
        ("<end>", ["a\nb\n\nc", "d\ne"]),
        ("\n\nc", ["a\nb", "<end> d\ne"]),
    ],
)
def test_document_separators(tmp_path, separator, documents):
    path = write(tmp_path / "a.txt", "a\nb\n\nc\n<end> d\ne\n")
    assert read(path, separator=separator) == documents


def test_own_separator_in_a_file_larger_than_the_buffer(tmp_path):
    documents = [f"{number} " + "words and words\n" * (1 + number % 7 * 3000) for number in range(60)]
    path = write(tmp_path / "a.txt", "<|end of text|>".join(documents))
    assert read(path, separator="<|end of text|>") == [document.strip() for document in documents]


def test_several_compressed_frames(tmp_path):
    for compression, compress in COMPRESS.items():
        parts = [compress(text.encode() + b"\n") for text in TEXTS]
        assert read(write(tmp_path / f"a.txt{compression}", b"".join(parts))) == TEXTS


def test_byte_order_mark_is_no_text(tmp_path):
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfhello\n")) == ["hello"]


def test_folders_and_globs(tmp_path):
    (tmp_path / "b" / ".hidden").mkdir(parents=True)
    for name in ("c.txt", "a.txt", "b/d.txt", ".e.txt", "b/.hidden/f.txt"):
        write(tmp_path / name, name)
    assert read(tmp_path) == ["a.txt", "b/d.txt", "c.txt"]
    assert read(tmp_path / "*.txt") == ["a.txt", "c.txt"]
    assert read(tmp_path / "**" / "d.txt") == ["b/d.txt"]
    assert "check the path" in error_of(tmp_path / "no-such*.txt")
    (tmp_path / "empty").mkdir()
    assert "no files" in error_of(tmp_path / "empty")


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kept", [0.5, 0.97])
def test_truncated_compressed_file(tmp_path, compression, kept):
    text = "\n".join(f"line {number * 7919 % 10007}" for number in range(20000)).encode()
    data = COMPRESS[compression](text)
    path = write(tmp_path / f"a.txt{compression}", data[: int(len(data) * kept)])
    assert f"a.txt{compression}: the compressed file is cut off" in error_of(path, max_bad_records=1000)


@pytest.mark.parametrize("compression", COMPRESS)
def test_file_that_is_not_compressed_as_its_name_says(tmp_path, compression):
    assert f"a.txt{compression}" in error_of(write(tmp_path / f"a.txt{compression}", "plain text\n" * 100))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.txt.gz", gzip.compress(b""), "a.txt.gz: the file is empty once decompressed"),
        ("a.txt", b"text\n\0\1\2", "a.txt: a binary file"),
        ("a.txt.zst", zstandard.compress(b"\0" * 100), "a.txt.zst: a binary file"),
        ("a.json", "[\n{},\n{]", "a.json:3: malformed JSON array"),
        ("a.parquet", b"PAR1 nonsense", "a.parquet: not a valid parquet file"),
    ],
    ids=["empty", "empty-gzip", "binary", "binary-zstandard", "json", "parquet"],
)
def test_files_that_cannot_be_skipped(tmp_path, name, content, said):
    assert said in error_of(write(tmp_path / name, content), max_bad_records=1000)


@pytest.mark.parametrize(
    ("name", "bad", "said"),
    [
        ("a.txt", b"caf\xe9", "a.txt:2: not valid UTF-8 (byte 0xe9)"),
        ("a.jsonl", b'{"text": "x"', "a.jsonl:2: malformed JSON"),
        ("a.jsonl", b'{"body": "x", "id": 1}', 'a.jsonl:2: no column "text" (there are: body, id); choose one'),
        ("a.jsonl", b'{"text": 5}', 'a.jsonl:2: "text" is not a string but int'),
        ("a.jsonl", b'"x"', "a.jsonl:2: a JSON object was expected, not str"),
        ("a.jsonl", rb'{"text": "\ud800"}', 'a.jsonl:2: "text" is not valid Unicode'),
    ],
)
def test_bad_records_are_counted_and_skipped(tmp_path, name, bad, said):
    good = b'{"text": "fine"}' if name.endswith("jsonl") else b"fine"
    path = write(tmp_path / name, b"\n".join([good, bad, good, bad, good]))
    message = error_of(path)
    assert said in message and "--max_bad_records" in message
    assert "2 bad records" in error_of(path, max_bad_records=1)
    assert read(path, max_bad_records=2) == ["fine"] * 3


def test_bad_records_of_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["fine", None, "good"]}), tmp_path / "a.parquet")
    assert 'a.parquet: record 2: "text" is not a string' in error_of(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", max_bad_records=1) == ["fine", "good"]


def test_real_pile_records(data_folder):
    assert len(read(data_folder / "pile" / "sample.jsonl.zst")) == 1045


# ---- Tables and archives -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_tables(tmp_path, kind, separator):
    texts = [*TEXTS, 'with "quotes", commas\tand\na line break', "x" * 200_000]
    with open(tmp_path / f"a{kind}", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows([["id", "body"], *enumerate(texts)])
    assert read(tmp_path / f"a{kind}", column="body") == texts
    assert 'no column "text" (there are: body, id)' in error_of(tmp_path / f"a{kind}")


def test_bad_rows_of_tables(tmp_path):
    path = write(tmp_path / "a.csv", b"id,text\n1,fine\n2\n3,caf\xe9\n\n4,good\n")
    assert "a.csv:3: 1 columns where the header has 2" in error_of(path)
    assert 'a.csv:4: "text" is not valid UTF-8' in error_of(path, max_bad_records=1)
    assert read(path, max_bad_records=2) == ["fine", "good"]


def archive(path, members):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in members.items():
                file.writestr(name, content)
        return path
    with tarfile.open(path, "w:" + (path.suffix[1:] if path.suffix != ".tar" else "")) as file:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", [".zip", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz"])
def test_archives(tmp_path, kind):
    members = {"d/": b""} if kind == ".zip" else {}
    members |= {
        "d/1.jsonl": CONTENTS[".jsonl"].encode(),
        "d/2.txt.gz": gzip.compress(b"four\nfive\n"),
        "3.txt": b"six",
    }
    assert sorted(read(archive(tmp_path / f"a{kind}", members))) == sorted([*TEXTS, "four", "five", "six"])
    path = archive(tmp_path / f"bad{kind}", {"in.jsonl": b'{"text": 1}\n'})
    assert f"{path}!in.jsonl:1: " in error_of(path)
    whole = path.read_bytes()
    assert path.name in error_of(write(tmp_path / f"cut{path.name}", whole[: len(whole) // 2]))


@pytest.mark.parametrize("kind", [".zip", ".tar"])
@pytest.mark.parametrize("name", ["../a.txt", "/a.txt", "b/../../a.txt"])
def test_members_outside_their_archive(tmp_path, kind, name):
    assert "lies outside the archive" in error_of(archive(tmp_path / f"a{kind}", {name: b"text"}))


def test_real_archive(data_folder):
    """Two members of JSON lines whose text is now a string, now a list of paragraphs."""
    path = data_folder / "pile" / "lm_dataformat_blns.jsonl.zst.tar"
    expected = []
    with tarfile.open(path) as file:
        for name in ("test_dir/2.zst", "test_dir/1.zst"):
            content = zstandard.ZstdDecompressor().stream_reader(file.extractfile(name)).read().decode()
            for line in content.splitlines():
                text = json.loads(line)["text"]
                expected.append((text if isinstance(text, str) else "\n\n".join(text)).strip())
    assert read(path) == [text for text in expected if text] and len(expected) == 8
