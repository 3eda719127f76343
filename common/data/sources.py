"""Where documents come from, and which of them are held out for validation."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from common.data.blocks import BadRecords, checked_text, missing_column
from common.data.documents import expand_files, read_documents
from common.data.embedded import embedded_documents, embedded_fingerprint
from common.data.hub import load_dataset, reading
from common.errors import UserError

HEAD_DOCUMENTS = 1000  # documents looked at to make sure that both parts get one
HEAD_CHARACTERS = 1 << 24


@dataclass
class Source:
    """A corpus that can be read more than once.

    Args:
        name: one phrase for people.
        slug: short name for a folder.
        identity: what tells this data from any other, for the cache's key; a JSON value.
        open: returns two functions that start reading the training and the validation documents, counting bad records;
            the second is None where validation documents must be held out of the first.
    """

    name: str
    slug: str
    identity: object
    open: Callable[[], tuple[Callable[[BadRecords], Iterator[str]], Callable[[BadRecords], Iterator[str]] | None]]


def choose_source(data_args) -> Source:
    """Choose the source that the flags name; the embedded corpus where they name none.

    Raises:
        UserError: files are missing.
    """
    if data_args.train_file:
        return _file_source(data_args)
    if data_args.dataset_name:
        return _hub_source(data_args)
    return _embedded_source(data_args)


def _embedded_source(data_args) -> Source:
    def open_source():
        documents = list(islice(embedded_documents(), data_args.max_train_documents))  # scanned once, read twice
        return lambda bad_records: iter(documents), None

    return Source("the documentation in the installed packages", "embedded", embedded_fingerprint(), open_source)


def _file_source(data_args) -> Source:
    train = expand_files(data_args.train_file)
    validation = expand_files(data_args.validation_file) if data_args.validation_file else []
    both = {path.resolve() for path in train} & {path.resolve() for path in validation}
    if both:
        raise UserError(f"{min(both)}: given by --train_file and by --validation_file; keep them apart")

    def reader(files):
        columns = (data_args.text_column, data_args.document_separator)
        return lambda bad_records: read_documents(files, *columns, bad_records)

    def open_source():
        return reader(train), reader(validation) if validation else None

    name = str(train[0]) if len(train) == 1 else f"{len(train)} files of {data_args.train_file}"
    identity = [_file_identities(train), _file_identities(validation)]
    return Source(name, _slug(train[0].name.split(".")[0]), identity, open_source)


def _hub_source(data_args) -> Source:
    name, config, column = data_args.dataset_name, data_args.dataset_config_name, data_args.text_column
    remedy = "check name, --dataset_config_name and network, or give a local copy with --train_file"

    def rows(dataset) -> Callable[[BadRecords], Iterator[str]]:
        if dataset.column_names and column not in dataset.column_names:
            raise UserError(f"--dataset_name {name}: {missing_column(column, dataset.column_names)}")

        def read(bad_records):
            with reading(f"--dataset_name {name}", remedy):
                for number, row in enumerate(dataset, start=1):
                    if column not in row:
                        raise UserError(f"--dataset_name {name}: {missing_column(column, row)}")
                    for text in checked_text(row[column], column, f"{name}: row {number}", bad_records):
                        if text.strip():
                            yield text.strip()

        return read

    def open_source():
        with reading(f"--dataset_name {name}", remedy):
            loaded = load_dataset(name, config, data_args.cache_dir, data_args.streaming)
        if "train" not in loaded:
            raise UserError(f"--dataset_name {name}: no split named train (there are: {', '.join(loaded)})")
        return rows(loaded["train"]), rows(loaded["validation"]) if "validation" in loaded else None

    local = _file_identities(expand_files(name)) if Path(name).exists() else None
    said = f"{name} ({config})" if config else name
    return Source(said, _slug(name.rstrip("/").rpartition("/")[2]), [name, config, local], open_source)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")[:40] or "data"


def _file_identities(files: list[Path]) -> list:
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def labelled_documents(data_args, source_parts, bad_records: BadRecords) -> Iterator[tuple[bool, str]]:
    """Yield (whether it is held out for validation, document), for all documents of a source.

    Args:
        data_args: --max_train_documents, --validation_split_percentage.
        source_parts: what a source's open() returned.
        bad_records: counts what cannot be used.
    """
    train, validation = source_parts
    documents = islice(train(bad_records), data_args.max_train_documents)
    if validation is None:
        yield from split(documents, data_args.validation_split_percentage)
    else:
        yield from ((False, document) for document in documents)
        yield from ((True, document) for document in validation(bad_records))


def split(documents: Iterable[str], percentage: float) -> Iterator[tuple[bool, str]]:
    """Hold out documents by a hash of their text, so that equal ones stay together whatever their order.

    Args:
        documents: texts.
        percentage: share of distinct documents to hold out, between 0 and 100; at least one is, and one is not.
    Yields:
        (whether it is held out, document).
    Raises:
        UserError: all documents are equal.
    """
    documents = iter(documents)
    head, hashes, characters = [], set(), 0
    for document in documents:
        head.append(document)
        hashes.add(document_hash(document))
        characters += len(document)
        if len(hashes) > 1 and (len(head) >= HEAD_DOCUMENTS or characters >= HEAD_CHARACTERS):
            break
    if len(hashes) == 1:
        raise UserError(
            "only one document (or equal ones), so none can be held out for validation; give --validation_file, or "
            "what ends a document with --document_separator"
        )
    limit = hold_out_limit(hashes, percentage) if hashes else 0
    yield from ((document_hash(document) <= limit, document) for document in chain(head, documents))


def hold_out_limit(hashes, percentage: float) -> int:
    """Return the largest 64-bit hash that is held out, such that both sides get one of `hashes` (two or more)."""
    return max(int(min(hashes)), min(int(percentage / 100 * 2**64), int(max(hashes)) - 1))


def document_hash(document: str) -> int:
    """64 bits that a text decides."""
    return int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest(), "big")
