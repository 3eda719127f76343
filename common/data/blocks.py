"""Blocks of documents, as they are read from a file: lines that nobody has looked at yet, or documents.

Cutting a file into blocks of whole lines costs next to nothing, so that one process keeps many others busy that decode
them, parse their JSON and tokenize.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from common.data.wikipedia import Wikitext
from common.errors import UserError

BLOCK_SIZE = 1 << 20  # bytes or characters, about: below this the pipes cost, above it memory does
BYTE_ORDER_MARK = "\ufeff"
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON's \\ud800 without its other half, which no encoder takes
ESCAPED_BYTE = 0xDC00  # Python's surrogateescape of a byte that is not UTF-8
SHOWN_COLUMNS = 10  # in a message


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


@dataclass(frozen=True)
class Lines:
    """Whole lines of a file, each of them a document or a JSON record of one.

    where: the file, for people. number: of the first line, from 1. data: bytes, UTF-8. text_column: key of a record
    that holds the text, None for plain text. first, step: of the lines that are not blank, those number first,
    first + step, ... from 0 count.
    """

    where: str
    number: int
    data: bytes
    text_column: str | None
    first: int = 0
    step: int = 1

    @property
    def size(self) -> int:
        """About its characters."""
        return len(self.data)

    def dealt(self, first: int, step: int) -> "Lines":
        """A part of it, as `first` and `step` say."""
        return replace(self, first=first, step=step)

    def documents(self, bad_records: BadRecords) -> Iterator[tuple[str, str]]:
        """Yield (text, label) of the documents that are not empty, as read_labelled does."""
        lines = self._lines(bad_records)
        if self.text_column is None:
            return ((line.strip(), "") for _, line in lines)
        return not_empty(self._records(lines, bad_records))

    def _lines(self, bad_records):
        try:
            text, valid = self.data.decode(), True
        except UnicodeDecodeError:
            text, valid = self.data.decode(errors="surrogateescape"), False
        if self.number == 1:
            text = text.removeprefix(BYTE_ORDER_MARK)
        numbered = enumerate(text.split("\n"), self.number)
        lines = [(number, line) for number, line in numbered if line and not line.isspace()]
        for number, line in lines[self.first :: self.step]:
            if not valid and (escaped := SURROGATE.search(line)):
                byte = ord(escaped[0]) - ESCAPED_BYTE
                bad_records.add(f"{self.where}:{number}", f"not valid UTF-8 (byte {byte:#04x})")
            else:
                yield number, line

    def _records(self, lines, bad_records):
        for number, line in lines:
            where = f"{self.where}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                bad_records.add(where, f"malformed JSON ({error})")
                continue
            yield from text_of(record, self.text_column, where, bad_records)


@dataclass(frozen=True)
class Documents:
    """Documents as (text, label), as read_labelled yields them."""

    pairs: list

    @property
    def size(self) -> int:
        """Characters."""
        return sum(len(text) for text, _ in self.pairs)

    def dealt(self, first: int, step: int) -> "Documents":
        """Those number first, first + step, ... from 0."""
        return Documents(self.pairs[first::step])

    def documents(self, bad_records: BadRecords) -> list[tuple[str, str]]:
        """The pairs."""
        return self.pairs


def gathered(pairs: Iterable[tuple[str, str]]) -> Iterator[Documents]:
    """Put (text, label) into blocks."""
    block, size = [], 0
    for pair in pairs:
        block.append(pair)
        size += len(pair[0])
        if size >= BLOCK_SIZE:
            yield Documents(block)
            block, size = [], 0
    if block:
        yield Documents(block)


def not_empty(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(text, label) without white space around the text, where there is something else; Wikitext is left as it is."""
    for text, label in pairs:
        if not isinstance(text, Wikitext):
            text = text.strip()
        if text:
            yield text, label


def text_of(record, text_column: str, where: str, bad_records: BadRecords) -> Iterator[tuple[str, str]]:
    """Yield the text and the label of one JSON record, or nothing where it is bad."""
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
