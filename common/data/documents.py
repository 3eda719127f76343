"""Text documents out of files: plain text, JSON, JSON lines, csv, tsv and parquet, also compressed or in archives."""

import csv
import glob
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from common.data.streams import Stream, reading, streams
from common.data.wikipedia import EXTRACTED, Wikitext, dump_articles, extracted_documents, plain
from common.errors import UserError, first_line

SNIFFED_BYTES = 8192  # a text file has no NUL byte among its first bytes; nearly every binary file does
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON's \\ud800 without its other half, which no encoder takes
SHOWN_COLUMNS = 10  # in a message
JOINED_CHARACTERS = 1 << 20  # text collected before it is searched for a separator of the user's own

# Text, but not of documents: read line by line it would train on separators and tags.
NOT_PLAIN_TEXT = (".xml", ".html", ".htm", ".yaml", ".yml", ".pdf", ".7z", ".rar")
SEPARATED = {".csv": ",", ".tsv": "\t"}


class BadRecords:
    """Counts the records that cannot be used; one more than `limit` ends the run.

    Args:
        limit: number of bad records that are skipped.
    """

    def __init__(self, limit: int = 0):
        self.limit = limit
        self.count = 0

    def add(self, where: str, what: str) -> None:
        """Count one bad record.

        Args:
            where: file and line or record number.
            what: what is wrong with it and, where there is one, the remedy.
        Raises:
            UserError: more than `limit` bad records were seen.
        """
        self.count += 1
        if self.count > self.limit:
            seen = f"; {self.count} bad records so far" if self.limit else ""
            raise UserError(f"{where}: {what}{seen}; correct it, or skip up to N bad records with --max_bad_records N")


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
    """Read documents one by one; the kind of a file is told by its name. Empty documents are left out.

    Args:
        files: text (any name not listed here), .json (an array, or JSON lines), .jsonl, .csv and .tsv with a header,
            .parquet, Wikipedia's pages-articles .xml and what WikiExtractor made of it; each also with .gz, .bz2, .xz
            or .zst behind it, or in a .zip or .tar.
        text_column: JSON key or column that holds the text.
        document_separator: what ends a document in plain text: "line", "blank_line", "file", or the literal string.
        bad_records: counts what cannot be used.
    Yields:
        (text, label): label is the part of the corpus that a JSON record names as the Pile's do, in
        record["meta"]["pile_set_name"]; else "". The articles of a Wikipedia dump are Wikitext, which is slow to
        make plain.
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
                    for text, label in _documents(stream, file, text_column, document_separator, bad_records):
                        if not isinstance(text, Wikitext):
                            text = text.strip()
                        if text:
                            yield text, label


def _documents(
    stream: Stream, file: BinaryIO, text_column: str, document_separator: str, bad_records: BadRecords
) -> Iterator[tuple[str, str]]:
    suffix, where = Path(stream.name).suffix, stream.where
    if suffix in (".json", ".jsonl"):
        return _json_documents(where, file, text_column, bad_records)
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
    else:
        texts = _text_documents(_lines(where, file, bad_records), document_separator)
    return ((text, "") for text in texts)


def _begins_with(file: BinaryIO, head: bytes) -> bool:
    return file.peek(len(head))[: len(head)] == head


def check_separator(document_separator: str) -> None:
    """Raise UserError where what ends a document is nothing."""
    if not document_separator:
        raise UserError("--document_separator is empty; give line, blank_line, file or the text that ends a document")


def _lines(where: str, file: BinaryIO, bad_records: BadRecords) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its line end); a line that is not UTF-8 is a bad record."""
    head = file.peek(SNIFFED_BYTES)[:SNIFFED_BYTES]
    if not head:
        raise UserError(f"{where}: the file is empty once decompressed; remove it or give another")
    if b"\0" in head:
        raise UserError(f"{where}: a binary file (or UTF-16), not UTF-8 text; convert it or leave it out")
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            bad_records.add(f"{where}:{number}", f"not valid UTF-8 (byte {line[error.start]:#04x})")
            continue
        yield number, text.rstrip("\r\n")


def _text_documents(lines: Iterator[tuple[int, str]], separator: str) -> Iterator[str]:
    texts = (text for _, text in lines)
    if separator == "line":
        yield from texts
    elif separator == "file":
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


def _json_documents(path: str, file: BinaryIO, text_column: str, bad_records: BadRecords) -> Iterator[tuple[str, str]]:
    lines = _lines(path, file, bad_records)
    first, head = next(((number, text) for number, text in lines if text.strip()), (1, ""))
    if head.lstrip().startswith("["):
        above = "\n" * (first - 1)  # so that a fault is reported with its line in the file
        whole = above + "\n".join([head, *(text for _, text in lines)])
        yield from _json_array(path, whole, text_column, bad_records)
        return
    for number, text in itertools.chain([(first, head)], lines):
        if not text.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            bad_records.add(where, f"malformed JSON ({error})")
            continue
        yield from _text_of(record, text_column, where, bad_records)


def _json_array(path: str, text: str, text_column: str, bad_records: BadRecords) -> Iterator[tuple[str, str]]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}{line}: malformed JSON array ({error}); correct the file") from error
    for number, record in enumerate(records, start=1):
        yield from _text_of(record, text_column, f"{path}: record {number}", bad_records)


def _text_of(record, text_column: str, where: str, bad_records: BadRecords) -> Iterator[tuple[str, str]]:
    """Yield the text and the label of one record, or nothing where it is bad."""
    if not isinstance(record, dict):
        bad_records.add(where, f"a JSON object was expected, not {type(record).__name__}")
    elif text_column not in record:
        bad_records.add(where, missing_column(text_column, record))
    else:
        meta = record.get("meta")
        label = meta.get("pile_set_name") if isinstance(meta, dict) else None
        for text in checked_text(record[text_column], text_column, where, bad_records):
            yield text, label if isinstance(label, str) else ""


def missing_column(text_column: str, columns: Iterable[str]) -> str:
    """Say that the text column is absent, which columns there are, and the flag that chooses one."""
    names = sorted(columns)
    there = ", ".join(names[:SHOWN_COLUMNS]) or "none"
    if len(names) > SHOWN_COLUMNS:
        there += f" and {len(names) - SHOWN_COLUMNS:,} more"
    return f'no column "{text_column}" (there are: {there}); choose one with --text_column'


def checked_text(text, text_column: str, where: str, bad_records: BadRecords) -> Iterator[str]:
    """Yield `text` if it is a string of valid Unicode, or paragraphs of it as lm_dataformat writes them (joined by an
    empty line, as its reader does); otherwise count a bad record."""
    if isinstance(text, list) and all(isinstance(part, str) for part in text):
        text = "\n\n".join(text)
    if not isinstance(text, str):
        bad_records.add(where, f'"{text_column}" is not a string but {type(text).__name__}')
    elif not text.isascii() and SURROGATE.search(text):
        bad_records.add(where, f'"{text_column}" is not valid Unicode (half of a surrogate pair)')
    else:
        yield text


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
