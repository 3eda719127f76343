"""Text documents out of files: plain text, JSON, JSON lines, csv, tsv and parquet, also compressed or in archives."""

import codecs
import csv
import glob
import io
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from common.data.blocks import (
    BLOCK_SIZE,
    SURROGATE,
    BadRecords,
    Documents,
    Lines,
    checked_text,
    gathered,
    missing_column,
    not_empty,
    text_of,
)
from common.data.streams import Stream, reading, streams
from common.data.wikipedia import EXTRACTED, dump_articles, extracted_documents, plain
from common.errors import UserError, first_line

SNIFFED_BYTES = 8192  # a text file has no NUL byte among its first bytes; nearly every binary file does
JOINED_CHARACTERS = 1 << 20  # text collected before it is searched for a separator of the user's own

# Text, but not of documents: read line by line it would train on separators and tags.
NOT_PLAIN_TEXT = (".xml", ".html", ".htm", ".yaml", ".yml", ".pdf", ".7z", ".rar")
SEPARATED = {".csv": ",", ".tsv": "\t"}


def expand_files(pattern: str) -> list[Path]:
    """List the files that a file name, a folder or a glob stands for.

    Args:
        pattern: a file, a folder (searched recursively, hidden files and folders skipped) or a glob with `**`.
    Returns:
        The files, sorted by path.
    Raises:
        UserError: nothing was found.
    """
    pattern = os.path.expanduser(pattern)
    found = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    if not found:
        raise UserError(f"{pattern}: no such file or folder, and no file matches it; check the path")
    files = set()
    for path in map(Path, found):
        if path.is_dir():
            files.update(_files_below(path))
        elif path.is_file():
            files.add(path)
        else:
            raise UserError(f"{path}: not a regular file; copy the data into one")
    if not files:
        raise UserError(f"{pattern}: the folder holds no files; check the path")
    return sorted(files)


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def read_documents(
    files: Iterable[Path], text_column: str, document_separator: str, bad_records: BadRecords
) -> Iterator[str]:
    """As read_labelled, the texts alone, all of them plain."""
    found = read_labelled(files, text_column, document_separator, bad_records)
    return (text for raw, _ in found if (text := plain(raw)))


def read_labelled(
    files: Iterable[Path], text_column: str, document_separator: str, bad_records: BadRecords
) -> Iterator[tuple[str, str]]:
    """Read documents one by one. Args, raises: as read_blocks.

    Yields:
        (text, label): label is the part of the corpus that a JSON record names as the Pile's do, in
        record["meta"]["pile_set_name"]; else "". The articles of a Wikipedia dump are Wikitext, which is slow to
        make plain. Empty documents are left out.
    """
    for block in read_blocks(files, text_column, document_separator, bad_records):
        yield from block.documents(bad_records)


def read_blocks(
    files: Iterable[Path], text_column: str, document_separator: str, bad_records: BadRecords
) -> Iterator[Lines | Documents]:
    """Read files in blocks of documents; the kind of a file is told by its name.

    Args:
        files: text (any name not listed here), .json (an array, or JSON lines), .jsonl, .csv and .tsv with a header,
            .parquet, Wikipedia's pages-articles .xml and what WikiExtractor made of it; each also with .gz, .bz2, .xz
            or .zst behind it, or in a .zip or .tar.
        text_column: JSON key or column that holds the text.
        document_separator: what ends a document in plain text: "line", "blank_line", "file", or the literal string.
        bad_records: counts what cannot be used; of Lines that is found by their documents().
    Raises:
        UserError: a missing, empty, binary or damaged file, or too many bad records.
    """
    check_separator(document_separator)
    for path in files:
        with reading(path):
            if path.stat().st_size == 0:
                raise UserError(f"{path}: the file is empty; remove it or give another")
            for stream in streams(path):
                with reading(stream.where), stream.open() as file:
                    yield from _blocks(stream, file, text_column, document_separator, bad_records)


def _blocks(
    stream: Stream, file: BinaryIO, text_column: str, document_separator: str, bad_records: BadRecords
) -> Iterator[Lines | Documents]:
    suffix, where = Path(stream.name).suffix, stream.where
    if suffix in (".json", ".jsonl"):
        return _json_blocks(where, file, text_column, bad_records)
    if suffix == ".parquet":
        texts = _parquet_documents(where, file, text_column, bad_records)
    elif suffix in SEPARATED:
        texts = _table_documents(where, file, SEPARATED[suffix], text_column, bad_records)
    elif ".xml" in stream.name and _begins_with(file, b"<mediawiki"):  # its parts end in .xml-p1p41242
        texts = dump_articles(file, where)
    elif suffix in NOT_PLAIN_TEXT:
        raise UserError(f"{where}: not a kind of file that is read; convert it to txt, jsonl or parquet")
    elif _begins_with(file, EXTRACTED.encode()):
        texts = extracted_documents(_lines(where, file, bad_records))
    elif document_separator == "line":
        return _line_blocks(where, file, None)
    else:
        texts = _text_documents(_lines(where, file, bad_records), document_separator)
    return gathered(not_empty((text, "") for text in texts))


def _begins_with(file: BinaryIO, head: bytes) -> bool:
    return file.peek(len(head))[: len(head)] == head


def check_separator(document_separator: str) -> None:
    """Raise UserError where what ends a document is nothing."""
    if not document_separator:
        raise UserError("--document_separator is empty; give line, blank_line, file or the text that ends a document")


def _line_blocks(where: str, file: BinaryIO, text_column: str | None) -> Iterator[Lines]:
    _check_text(where, file)
    number = 1
    while data := file.read(BLOCK_SIZE):
        if not data.endswith(b"\n"):
            data += file.readline()
        yield Lines(where, number, data, text_column)
        number += data.count(b"\n")


def _check_text(where: str, file: BinaryIO) -> None:
    head = file.peek(SNIFFED_BYTES)[:SNIFFED_BYTES]
    if not head:
        raise UserError(f"{where}: the file is empty once decompressed; remove it or give another")
    if b"\0" in head:
        raise UserError(f"{where}: a binary file (or UTF-16), not UTF-8 text; convert it or leave it out")


def _lines(where: str, file: BinaryIO, bad_records: BadRecords) -> Iterator[tuple[int, str]]:
    _check_text(where, file)
    return _decoded(where, file, bad_records)


def _decoded(where: str, lines: Iterable[bytes], bad_records: BadRecords) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its line end); a line that is not UTF-8 is a bad record."""
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            bad_records.add(f"{where}:{number}", f"not valid UTF-8 (byte {line[error.start]:#04x})")
            continue
        yield number, text.rstrip("\r\n")


def _text_documents(lines: Iterator[tuple[int, str]], separator: str) -> Iterator[str]:
    texts = (text for _, text in lines)
    if separator == "file":
        yield "\n".join(texts)
    elif separator == "blank_line":
        paragraph = []
        for text in texts:
            if text.strip():
                paragraph.append(text)
            else:
                yield "\n".join(paragraph)
                paragraph = []
        yield "\n".join(paragraph)
    else:
        pending, size = [""], 0
        for text in texts:
            pending.append(text)
            size += len(text)
            if size > max(JOINED_CHARACTERS, len(pending[0])):  # a long rest is searched ever more rarely
                *documents, rest = "\n".join(pending).split(separator)
                yield from documents
                pending, size = [rest], 0
        yield from "\n".join(pending).split(separator)


def _json_blocks(where: str, file: BinaryIO, text_column: str, bad_records: BadRecords) -> Iterator[Lines | Documents]:
    blocks = _line_blocks(where, file, text_column)
    head = next(blocks)
    if head.data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        lines = _decoded(where, io.BytesIO(head.data + file.read()), bad_records)
        whole = "\n".join(text for _, text in lines)
        yield from gathered(not_empty(_json_array(where, whole, text_column, bad_records)))
    else:
        yield from itertools.chain([head], blocks)


def _json_array(path: str, text: str, text_column: str, bad_records: BadRecords) -> Iterator[tuple[str, str]]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}{line}: malformed JSON array ({error}); correct the file") from error
    for number, record in enumerate(records, start=1):
        yield from text_of(record, text_column, f"{path}: record {number}", bad_records)


def _table_documents(
    path: str, file: BinaryIO, separator: str, text_column: str, bad_records: BadRecords
) -> Iterator[str]:
    """Rows of a csv with a header; quoting as in RFC 4180, of a tsv too."""
    csv.field_size_limit(sys.maxsize)
    with io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="") as text:
        rows = csv.reader(text, delimiter=separator)
        header = next(rows, [])
        if text_column not in header:
            raise UserError(f"{path}: {missing_column(text_column, header)}")
        column = header.index(text_column)
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if len(row) <= column:
                if row:
                    bad_records.add(where, f"{len(row)} columns where the header has {len(header)}")
            elif SURROGATE.search(row[column]):
                bad_records.add(where, f'"{text_column}" is not valid UTF-8')
            else:
                yield row[column]


def _parquet_documents(path: str, file: BinaryIO, text_column: str, bad_records: BadRecords) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if text_column not in table.schema_arrow.names:
                raise UserError(f"{path}: {missing_column(text_column, table.schema_arrow.names)}")
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_column]):
                for value in batch.column(0):
                    number += 1
                    where = f"{path}: record {number}"
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError:
                        bad_records.add(where, f'"{text_column}" is not valid UTF-8')
                        continue
                    yield from checked_text(text, text_column, where, bad_records)
    except (pyarrow.ArrowException, OSError) as error:
        reason = first_line(error)
        raise UserError(f"{path}: not a valid parquet file ({reason}); copy or download it again") from error
