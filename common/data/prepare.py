"""From the data flags to token files ready for training, prepared once and kept in a cache."""

import contextlib
import hashlib
import json
import os
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.data.blocks import BadRecords
from common.data.masking import random_bits
from common.data.sources import Source, choose_source, hold_out_limit, labelled_documents
from common.data.token_files import BLOCK_TOKENS, TokenFile, TokenFileWriter, token_dtype
from common.data.tokenizers import MASKED, TokenizerKind, load_tokenizer, tokenizer_fingerprint, vocabulary_size
from common.data.tokenizing import BATCH_CHARACTERS, tokenize
from common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VERSION = 1  # of what is prepared; a new one makes caches prepare again
DEFAULT_CACHE_DIR = "runs/cache"
TOKENIZER_SAMPLE_CHARACTERS = 64 << 20  # more text hardly changes a vocabulary
SECONDS_BETWEEN_REPORTS = 30


@dataclass
class PreparedCorpus:
    """Token files with the tokenizer that made them.

    Args:
        train, validation: token files, or views of some documents of one.
        tokenizer: has the special tokens that its kind needs.
        folder: where the files lie.
        source: one phrase for people.
        fingerprint: hash over both parts and the tokenizer; equal for equal training data.
        rows_folder: in the cache, for what is derived from just these documents.
    """

    train: TokenFile
    validation: TokenFile
    tokenizer: "PreTrainedTokenizerFast"
    folder: Path
    source: str
    fingerprint: str
    rows_folder: Path


def prepare_corpus(data_args, say: Callable[[str], None] = print, kind: TokenizerKind = MASKED) -> PreparedCorpus:
    """Find the corpus that the flags name in the cache, or prepare it there.

    Several processes may call this at once; one prepares and the others wait for it.

    Args:
        data_args: the data flags, already checked (common/arguments.py). `cache_dir` None means runs/cache, and
            Hugging Face's own cache for downloads; `max_train_documents` reads the first documents alone, before any
            are held out.
        say: called with a line of text now and then.
        kind: of tokenizer: MASKED or CAUSAL (common/data/tokenizers.py).
    Returns:
        Token files with one sequence per document, without special tokens.
    Raises:
        UserError: the data, the tokenizer or the cache cannot be used.
    """
    cache = Path(data_args.cache_dir or DEFAULT_CACHE_DIR).expanduser()
    with _writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
    if data_args.dataset_path:
        return _open_token_files(data_args, cache, say, kind)
    return _prepare_cached(data_args, cache, say, kind)


@contextlib.contextmanager
def _writing(path: Path):
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: cannot be written ({error.strerror or error}); free some space, or choose "
            "another folder with --cache_dir"
        ) from error


@contextlib.contextmanager
def _locked(cache: Path, name: str, say):
    import filelock

    lock = filelock.FileLock(cache / f".{name}.lock")
    with _writing(cache):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            say(f"waiting for another process that prepares {cache / name}")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _prepare_cached(data_args, cache: Path, say, kind: TokenizerKind) -> PreparedCorpus:
    source = choose_source(data_args)
    tokenizer = _named_tokenizer(data_args, kind)
    fingerprint = tokenizer and tokenizer_fingerprint(tokenizer)
    trained = {"trained_vocab_size": data_args.tokenizer_train_vocab_size}
    if kind != MASKED:  # whose caches are older than the kinds
        trained["kind"] = kind.name
    ingredients = {
        "version": VERSION,
        "source": source.identity,
        "tokenizer": fingerprint or trained,
        "text_column": data_args.text_column,
        "document_separator": data_args.document_separator,
        "validation_split_percentage": data_args.validation_split_percentage,
        "max_train_documents": data_args.max_train_documents,
        "max_bad_records": data_args.max_bad_records,
    }
    name = f"{source.slug}-{_digest(ingredients)[:12]}"
    folder = cache / name
    with _locked(cache, name, say):
        if folder.exists() and not data_args.overwrite_cache:
            say(f"data: reusing {folder} ({source.name})")
        else:
            with _writing(folder):
                _build(folder, source, tokenizer, ingredients, data_args, say, kind)
        if tokenizer is None:
            tokenizer = load_tokenizer(str(folder / "tokenizer"), kind=kind)
            fingerprint = tokenizer_fingerprint(tokenizer)
        train, validation = TokenFile(folder / "train"), TokenFile(folder / "validation")
        _verify_once([train, validation], tokenizer, fingerprint, cache)
    return _prepared(cache, train, validation, tokenizer, fingerprint, folder, source.name)


def _named_tokenizer(data_args, kind: TokenizerKind):
    if not data_args.tokenizer_name:
        return None
    return load_tokenizer(data_args.tokenizer_name, data_args.cache_dir, data_args.trust_remote_code, kind)


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _build(folder: Path, source: Source, tokenizer, ingredients: dict, data_args, say, kind: TokenizerKind) -> None:
    """Prepare `folder` whole under another name, then rename it."""
    began = time.monotonic()
    say(f"data: preparing {source.name} in {folder}")
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed; the lock is ours
    unfinished.mkdir()
    try:
        parts = source.open()
        if tokenizer is None:
            tokenizer = _train_tokenizer(parts, data_args, say, kind)
        tokenizer.save_pretrained(unfinished / "tokenizer")
        _write_token_files(unfinished, parts, tokenizer, data_args, say)
        (unfinished / "corpus.json").write_text(json.dumps({"name": source.name, **ingredients}, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    say(f"data: prepared in {time.monotonic() - began:.1f} s")


def _train_tokenizer(parts, data_args, say, kind: TokenizerKind):
    began = time.monotonic()
    sample, size = [], 0
    for held_out, document in labelled_documents(data_args, parts, BadRecords(data_args.max_bad_records)):
        if not held_out:
            sample.append(document)
            size += len(document)
        if size >= TOKENIZER_SAMPLE_CHARACTERS:
            break
    if not sample:
        raise UserError(NO_DOCUMENTS)
    tokenizer = kind.train(sample, data_args.tokenizer_train_vocab_size)
    say(
        f"data: trained a {kind.name} of {len(tokenizer):,} on {size / 1e6:.1f} MB of text "
        f"in {time.monotonic() - began:.1f} s"
    )
    return tokenizer


NO_DOCUMENTS = (
    "the data hold no documents (nothing but white space?); check --train_file, --dataset_name, --text_column"
)


def _write_token_files(folder: Path, parts, tokenizer, data_args, say) -> None:
    began = last_report = time.monotonic()
    vocab_size = vocabulary_size(tokenizer)
    bad_records = BadRecords(data_args.max_bad_records)
    held_out_of = deque()  # of the batches that are being tokenized
    characters = 0

    def batches() -> Iterator[list[str]]:
        """Lists of documents that are all held out, or all not."""
        nonlocal characters
        batch, size = {False: [], True: []}, {False: 0, True: 0}
        for held_out, document in labelled_documents(data_args, parts, bad_records):
            batch[held_out].append(document)
            size[held_out] += len(document)
            characters += len(document)
            if size[held_out] >= BATCH_CHARACTERS:
                held_out_of.append(held_out)
                yield batch[held_out]
                batch[held_out], size[held_out] = [], 0
        for held_out in (False, True):
            held_out_of.append(held_out)
            yield batch[held_out]

    dtype = token_dtype(vocab_size)
    workers = data_args.preprocessing_num_workers or _available_cores()
    with (
        TokenFileWriter(folder / "train", dtype) as train,
        TokenFileWriter(folder / "validation", dtype) as validation,
    ):
        for tokens, lengths in tokenize(batches(), tokenizer.backend_tokenizer.to_str(), dtype, workers, say):
            (validation if held_out_of.popleft() else train).append(tokens, lengths)
            if time.monotonic() - last_report >= SECONDS_BETWEEN_REPORTS:
                last_report = time.monotonic()
                rate = characters / 1e6 / (last_report - began)
                say(f"data: {characters / 1e6:,.0f} MB of text so far, {rate:.1f} MB/s")
        if not train.num_tokens + validation.num_tokens:
            raise UserError(NO_DOCUMENTS)
        if not validation.num_tokens:
            raise UserError("no documents for validation; check --validation_file or the data set's validation split")
        if not train.num_tokens:
            raise UserError("no documents are left for training; lower --validation_split_percentage")
        metadata = {
            "tokenizer_name": data_args.tokenizer_name or "trained on the data",
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
            "vocab_size": vocab_size,
            "special_ids": {
                role: number
                for role in ("pad", "unk", "cls", "sep", "mask", "bos", "eos")
                if (number := getattr(tokenizer, f"{role}_token_id")) is not None
            },
        }
        train.finish(metadata)
        validation.finish(metadata)
    seconds = time.monotonic() - began
    skipped = f", {bad_records.count} bad records skipped" if bad_records.count else ""
    say(
        f"data: {train.num_documents:,} documents for training and {validation.num_documents:,} for validation, "
        f"{characters / 1e6:.1f} MB of text, {(train.num_tokens + validation.num_tokens) / 1e6:.2f} M tokens "
        f"in {seconds:.1f} s{skipped}"
    )


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _open_token_files(data_args, cache: Path, say, kind: TokenizerKind) -> PreparedCorpus:
    """Use token files that lie elsewhere: a folder with train and perhaps validation, or a prefix."""
    path = Path(data_args.dataset_path).expanduser()
    if path.suffix in (".bin", ".idx"):
        path = path.with_suffix("")
    prefix = path / "train" if path.is_dir() else path
    train = TokenFile(prefix)
    tokenizer = _named_tokenizer(data_args, kind)
    if tokenizer is None:
        folder = prefix.parent / "tokenizer"
        if not folder.is_dir():
            raise UserError(
                f"--dataset_path {path}: has no tokenizer folder; name its tokenizer with --tokenizer_name"
            )
        tokenizer = load_tokenizer(str(folder), kind=kind)
    fingerprint = tokenizer_fingerprint(tokenizer)
    own_validation = path.is_dir() and (path / "validation.bin").exists()
    parts = [train, TokenFile(path / "validation")] if own_validation else [train]
    with _locked(cache, "token-files", say):
        _verify_once(parts, tokenizer, fingerprint, cache)
    if data_args.max_train_documents:
        train = train.subset(np.arange(min(data_args.max_train_documents, train.num_documents)))
    if own_validation:
        validation = parts[1]
    else:
        train, validation = _hold_out(train, data_args.validation_split_percentage)
    say(f"data: using {path} ({train.num_documents:,} + {validation.num_documents:,} documents)")
    return _prepared(cache, train, validation, tokenizer, fingerprint, prefix.parent, str(path))


def _hold_out(token_file: TokenFile, percentage: float) -> tuple[TokenFile, TokenFile]:
    """Split by a hash of the document's number; the text that it came from is not at hand."""
    if token_file.num_documents < 2:
        raise UserError(
            f"{token_file.prefix}: one document, of which none can be held out; give validation.bin and .idx"
        )
    hashes = random_bits(0, np.arange(token_file.num_documents))
    held_out = hashes <= np.uint64(hold_out_limit(hashes, percentage))
    return token_file.subset(np.flatnonzero(~held_out)), token_file.subset(np.flatnonzero(held_out))


def _verify_once(token_files: list[TokenFile], tokenizer, fingerprint: str, cache: Path) -> None:
    """Check token files against their tokenizer, and their content where it may have changed since the last check."""
    for part in token_files:
        if part.metadata and part.metadata["tokenizer_fingerprint"] != fingerprint:
            raise UserError(
                f"{part.prefix}.bin: made with another tokenizer ({part.metadata['tokenizer_name']}); give that "
                "one with --tokenizer_name, or prepare the data again"
            )
    files = [path.resolve() for part in token_files for path in part.paths.values() if path.exists()]
    facts = json.dumps([fingerprint, *([path.stat().st_size, path.stat().st_mtime_ns] for path in files)])
    stamp = cache / f".{_digest(list(map(str, files)))[:16]}.verified"
    if stamp.exists() and stamp.read_text() == facts:
        return
    for part in token_files:
        part.verify()
        if part.metadata is None:
            _check_ids(part, vocabulary_size(tokenizer))
    with _writing(stamp):
        stamp.write_text(facts)


def _check_ids(token_file: TokenFile, vocab_size: int) -> None:
    for at in range(0, len(token_file.tokens), BLOCK_TOKENS):
        block = token_file.tokens[at : at + BLOCK_TOKENS]
        for token in (int(block.min()), int(block.max())):
            if not 0 <= token < vocab_size:
                raise UserError(
                    f"{token_file.prefix}.bin: holds token {token}, but the tokenizer has only {vocab_size}; give the "
                    "one that made it with --tokenizer_name"
                )


def _prepared(cache: Path, train, validation, tokenizer, tokenizer_fingerprint: str, folder: Path, source: str):
    facts = [tokenizer_fingerprint]
    for part in (train, validation):
        content = part.metadata["checksums"] if part.metadata else part.paths["bin"].stat().st_size
        facts += [content, zlib.crc32(part.starts), zlib.crc32(part.lengths)]
    fingerprint = _digest(facts)
    return PreparedCorpus(train, validation, tokenizer, folder, source, fingerprint, cache / "rows" / fingerprint)
