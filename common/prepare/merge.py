"""Put shards together: train, validation and test, without documents that occur twice, in memory of one shard."""

import numpy as np

from common.data.ranges import ranges
from common.data.token_files import TokenFile, TokenFileWriter, token_dtype
from common.errors import UserError
from common.prepare.shards import ShardFiles

SPLITS = ("train", "validation", "test")
COMPARED = 1 << 22  # hashes that are compared at once
BLOCK_TOKENS = 1 << 22  # copied at once; a longer document is copied whole


def merge(shards, folder, prepared_with, args, say):
    """Write the token files of all splits, unless they are there.

    Args:
        shards: list of Shard; folder: Path, the output's; prepared_with: Settings; args: PrepareArguments; say:
            function that prints a line.
    Raises:
        UserError: shards that are missing or damaged.
    """
    files = [ShardFiles(folder / "shards", shard) for shard in shards]
    missing = [str(one.shard.number) for one in files if not one.is_finished(prepared_with.of_shard(one.shard))]
    if missing:
        raise UserError(f"shards {','.join(missing)} are missing: tokenize {','.join(missing)},")
    opened = [shard for one in files if (shard := one.open())]
    settings = {
        "shards": [shard.tokens.metadata["checksums"]["bin"] for shard in opened],
        "deduplicate": args.deduplicate,
        "validation_split_percentage": args.validation_split_percentage,
        "test_split_percentage": args.test_split_percentage,
    }
    if _is_finished(folder / SPLITS[0], settings):  # the last one to be written
        say(f"{folder}: finished already")
        return
    total = sum(shard.tokens.num_documents for shard in opened)
    repeated = find_repeated([shard.hashes for shard in opened], [shard.documents for shard in opened])
    if not args.deduplicate:
        repeated = [np.zeros_like(marks) for marks in repeated]
    written = {}
    for split, name in reversed(list(enumerate(SPLITS))):
        with TokenFileWriter(folder / name, token_dtype(prepared_with.vocab_size)) as writer:
            sources = {}  # documents and tokens by label
            for shard, marks in zip(opened, repeated, strict=True):
                splits = np.empty(len(marks), np.uint8)
                percentages = args.validation_split_percentage, args.test_split_percentage
                splits[shard.documents] = split_of(shard.hashes, *percentages)
                kept = np.flatnonzero((splits == split) & ~marks)
                copy_documents(writer, shard.tokens, kept)
                for label, *more in count_sources(shard, kept):
                    sources[label] = [had + new for had, new in zip(sources.get(label, (0, 0)), more, strict=True)]
            if not writer.num_documents and not split:
                raise UserError("no documents are left for training: give more text, or hold out less")
            written[name] = writer.num_documents, writer.num_tokens
            if writer.num_documents:
                writer.finish(prepared_with.of_token_file() | {"sources": sources, "settings": settings})
            else:  # an older one must not stay
                for path in writer.paths.values():
                    path.unlink(missing_ok=True)
    dropped = sum(int(marks.sum()) for marks in repeated)
    counts = ", ".join(f"{written[name][0]:,} for {name}" for name in SPLITS)
    tokens = sum(tokens for _, tokens in written.values())
    say(f"{folder}: {counts}; {tokens / 1e6:.2f} M tokens; {dropped:,} of {total:,} documents occurred before")


def split_of(hashes, validation_percentage, test_percentage):
    """The split of each document, by its text alone: uint8 [n], numbers of SPLITS. Args: hashes: uint64 [n]."""
    first = int(validation_percentage / 100 * 2**64)
    second = first + int(test_percentage / 100 * 2**64)
    found = np.zeros(len(hashes), np.uint8)
    found[np.asarray(hashes) < np.uint64(second)] = 2
    found[np.asarray(hashes) < np.uint64(first)] = 1
    return found


def find_repeated(hashes, orders):
    """Which documents have a text that an earlier one has, in the order of the shards.

    Args:
        hashes: for each shard uint64 [n], ascending; orders: for each uint32 [n], the documents they belong to, which
            for equal hashes ascend.
    Returns:
        list of bool [n] by document.
    """
    marks = [np.zeros(len(order), bool) for order in orders]
    parts = -(-sum(map(len, hashes)) // COMPARED) or 1
    for part in range(parts):
        low, high = (np.uint64(min(at * 2**64 // parts, 2**64 - 1)) for at in (part, part + 1))
        side = "right" if part == parts - 1 else "left"  # the last part has the largest hash too
        bounds = [(found.searchsorted(low), found.searchsorted(high, side=side)) for found in hashes]
        here = np.concatenate([found[begin:end] for found, (begin, end) in zip(hashes, bounds, strict=True)])
        again = np.zeros(len(here), bool)
        order = np.argsort(here, kind="stable")
        again[order[1:]] = here[order[1:]] == here[order[:-1]]
        at = 0
        for found, numbers, (begin, end) in zip(marks, orders, bounds, strict=True):
            found[numbers[begin:end][again[at : at + end - begin]]] = True
            at += end - begin
    return marks


def count_sources(shard, documents):
    """Yield (label, documents, tokens) of every source among some documents. Args: shard: FinishedShard."""
    labels, sources = shard.tokens.metadata["sources"], shard.sources[documents]
    counts = np.bincount(sources, minlength=len(labels))
    tokens = np.bincount(sources, shard.tokens.document_lengths()[documents], len(labels)).astype(int)
    for number, label in enumerate(labels):
        if counts[number]:
            yield label, int(counts[number]), int(tokens[number])


def copy_documents(writer, tokens, documents):
    """Append documents of a token file, some millions of tokens at a time.

    Args:
        writer: TokenFileWriter; tokens: TokenFile; documents: int64 [n], ascending.
    """
    ends = np.cumsum(tokens.document_lengths()[documents])
    begin = 0
    while begin < len(documents):
        before = ends[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + BLOCK_TOKENS, side="right")))
        first, last = tokens.documents[documents[begin:end]], tokens.documents[documents[begin:end] + 1]
        sequences = ranges(first, last - first)
        starts, lengths = tokens.starts[sequences], tokens.lengths[sequences]
        writer.append(tokens.tokens[ranges(starts, lengths)], lengths, last - first)
        begin = end


def _is_finished(prefix, settings):
    if not prefix.with_suffix(".json").exists():
        return False
    try:
        found = TokenFile(prefix)
    except UserError:
        return False
    return found.metadata is not None and found.metadata.get("settings") == settings
