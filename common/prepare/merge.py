"""Put shards together: train, validation and test, without what occurs twice, in bounded memory."""

import json
from dataclasses import dataclass

import numpy as np

from common.data.ranges import ranges
from common.data.token_files import TokenFile, TokenFileWriter, token_dtype
from common.errors import UserError
from common.files import write_whole
from common.prepare.encoding import SAMPLES, Dropped
from common.prepare.repeated import Repeated
from common.prepare.shards import ShardFiles, writing

SPLITS = ("train", "validation", "test")
BLOCK_TOKENS = 1 << 20  # copied at once; a longer document is copied whole
SETTINGS = (
    "deduplicate",
    "near_duplicates",
    "deduplicate_lines",
    "weights",
    "validation_split_percentage",
    "test_split_percentage",
)
TOTALS = ("documents", "tokens", "characters", "words")  # kept for each source


def merge(shards, folder, prepared_with, args, say):
    """Write the token files of all splits and dropped.json, unless they are there.

    Args:
        shards: list of Shard; folder: Path, the output's; prepared_with: Settings; args: PrepareArguments; say:
            function that prints a line.
    Raises:
        UserError: shards that are missing or damaged, weights that cannot be had.
    """
    files = [ShardFiles(folder / "shards", shard) for shard in shards]
    missing = [str(one.shard.number) for one in files if not one.is_finished(prepared_with.of_shard(one.shard))]
    if missing:
        raise UserError(f"shards {','.join(missing)} are missing: tokenize {','.join(missing)},")
    described = [json.loads(one.described_in.read_bytes()) for one in files]
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["shards"] = [found["checksums"]["bin"] for found in described]
    if _is_finished(folder / SPLITS[0], settings):  # the last one to be written
        say(f"{folder}: finished already")
        return
    with writing(folder):
        written, dropped = _write_splits(files, described, folder, prepared_with, settings, args)
    for reason, (count, _) in dropped.reasons.items():
        say(f"left out {count:,}: {reason}")
    counts = ", ".join(f"{written[name][0]:,} for {name}" for name in SPLITS)
    say(f"{folder}: {counts}; {sum(tokens for _, tokens in written.values()) / 1e6:.2f} M tokens")


def _write_splits(files, described, folder, prepared_with, settings, args):
    """Write everything. Returns: (documents and tokens by split, Dropped)."""
    opened = [shard for one in files if (shard := one.open())]
    with Repeated(opened, folder / "shards") as repeated:
        if args.deduplicate:
            repeated.find_documents()
        if args.near_duplicates:
            repeated.find_near_duplicates()
        if args.deduplicate_lines:
            repeated.find_lines(args.deduplicate_lines)
        dropped = _dropped(described, opened, repeated, prepared_with.tokenizer)
        write_whole(folder / "dropped.json", json.dumps(dropped.reasons, indent=2, ensure_ascii=False) + "\n")
        copies = _copies(opened, repeated, args)
        written = {}
        for name in reversed(SPLITS):
            written[name] = _write_split(name, opened, repeated, copies, folder, prepared_with, settings, args)
    return written, dropped


def split_of(hashes, validation_percentage, test_percentage):
    """The split of each document, by its text alone: uint8 [n], numbers of SPLITS. Args: hashes: uint64 [n]."""
    first = int(validation_percentage / 100 * 2**64)
    second = first + int(test_percentage / 100 * 2**64)
    found = np.zeros(len(hashes), np.uint8)
    found[np.asarray(hashes) < np.uint64(second)] = 2
    found[np.asarray(hashes) < np.uint64(first)] = 1
    return found


def _write_split(name, opened, repeated, copies, folder, prepared_with, settings, args):
    """Write one token file, or remove an older one where there is nothing for it. Returns: (documents, tokens)."""
    percentages = args.validation_split_percentage, args.test_split_percentage
    with TokenFileWriter(folder / name, token_dtype(prepared_with.vocab_size)) as writer:
        sources = {}
        for number, shard in enumerate(opened):
            for window in shard.windows():
                hashes = repeated.hashes(number, window)
                here = split_of(hashes, *percentages) == SPLITS.index(name)
                kept = np.flatnonzero(here & repeated.kept(number, window))
                if name == "train":
                    kept = np.repeat(kept, copies.of(shard, window, hashes, kept))
                if args.deduplicate_lines:
                    copy_lines(writer, window.tokens, kept, repeated.kept_sequences(number, window))
                else:
                    copy_documents(writer, window.tokens, kept)
                for label, totals in _count_sources(shard, window, kept):
                    sources[label] = [had + new for had, new in zip(sources.get(label, [0] * 4), totals, strict=True)]
        if writer.num_documents:
            writer.finish(prepared_with.of_token_file() | {"sources": sources, "settings": settings})
        elif name == "train":
            raise UserError("no documents are left for training: give more text, or hold out or filter less")
        else:
            for path in writer.paths.values():
                path.unlink(missing_ok=True)
        return writer.num_documents, writer.num_tokens


@dataclass(frozen=True)
class _Copies:
    """How often the documents of each source are in the training split. by_source: {number: times}."""

    by_source: dict

    def of(self, shard, window, hashes, documents):
        """int64 [n] for n documents of a window: the fraction of a number of times falls by the text's hash."""
        if not self.by_source:
            return np.ones(len(documents), np.int64)
        inputs = np.array([self.by_source[source] for source, _ in shard.described["inputs"]])
        times = inputs[shard.column("sources")[window.documents][documents]]
        # the split takes the hash's upper bits; a multiplication brings up the lower ones
        chance = (hashes[documents] * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(11)) / 2.0**53
        return np.floor(times + chance).astype(np.int64)


def _copies(opened, repeated, args):
    """How often to take the documents of each --input, so that its tokens have the share that --weights asks for."""
    if not args.weights:
        return _Copies({})
    tokens = np.zeros(len(args.weights))
    for number, shard in enumerate(opened):
        inputs = np.array([source for source, _ in shard.described["inputs"]])
        for window in shard.windows():
            lengths = window.tokens.document_lengths() * repeated.kept(number, window)
            tokens += np.bincount(inputs[shard.column("sources")[window.documents]], lengths, len(tokens))
    shares = np.array(args.weights) / sum(args.weights)
    empty = [number for number, share in enumerate(shares) if share and not tokens[number]]
    if empty:
        raise UserError(f"--weights: --input number {empty[0] + 1} has no documents: give it the weight 0")
    times = np.divide(shares * tokens.sum(), tokens, out=np.zeros_like(shares), where=tokens > 0)
    return _Copies(dict(enumerate(times.tolist())))


def _count_sources(shard, window, documents):
    """Yield (label, totals) of every source among some documents of a window."""
    inputs = shard.described["inputs"]
    sources, characters, words = (
        shard.column(name)[window.documents][documents] for name in ("sources", "characters", "words")
    )
    weights = None, window.tokens.document_lengths()[documents], characters, words
    columns = [np.bincount(sources, weight, len(inputs)).astype(np.int64) for weight in weights]
    for number, (_, label) in enumerate(inputs):
        if columns[0][number]:
            yield label, [int(column[number]) for column in columns]


def copy_documents(writer, tokens, documents):
    """Append documents of a token file, some millions of tokens at a time.

    Args:
        writer: TokenFileWriter; tokens: TokenFile; documents: int64 [n], ascending; one may stand there twice.
    """
    for some in _blocks(tokens, documents):
        first, last = tokens.documents[some], tokens.documents[some + 1]
        sequences = ranges(first, last - first)
        starts, lengths = tokens.starts[sequences], tokens.lengths[sequences]
        writer.append(tokens.tokens[ranges(starts, lengths)], lengths, last - first)


def copy_lines(writer, tokens, documents, kept):
    """Append documents of a token file whose sequences are lines, without some of them, each as one sequence.

    Args:
        writer, tokens, documents: as copy_documents; kept: bool [n] for each sequence of the file.
    """
    for some in _blocks(tokens, documents):
        first, last = tokens.documents[some], tokens.documents[some + 1]
        sequences = ranges(first, last - first)
        lengths = np.where(kept[sequences], tokens.lengths[sequences], 0)
        ends = np.cumsum(last - first)
        total = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        writer.append(
            tokens.tokens[ranges(tokens.starts[sequences], lengths)], total[ends] - total[ends - (last - first)]
        )


def _blocks(tokens, documents):
    """Yield `documents` in parts of some millions of tokens."""
    ends = np.cumsum(tokens.document_lengths()[documents])
    begin = 0
    while begin < len(documents):
        before = ends[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + BLOCK_TOKENS, side="right")))
        yield documents[begin:end]
        begin = end


def _dropped(described, opened, repeated, tokenizer):
    """Everything that was left out, by reason: Dropped."""
    dropped = Dropped()
    for found in described:
        for reason, (count, texts) in found["dropped"].items():
            dropped.add(reason, texts, count)
    for number, shard in enumerate(opened):
        for window in shard.windows():
            tokens = window.tokens
            for reason, places, is_line in repeated.found(number, window):
                if not len(places):
                    continue
                texts = []
                for place in places[:SAMPLES]:
                    first = place if is_line else tokens.documents[place]
                    start = tokens.starts[first]
                    length = tokens.lengths[first] if is_line else tokens.document_lengths()[place]
                    texts.append(tokenizer.decode(tokens.tokens[start : start + length]))
                dropped.add(reason, texts, len(places))
    return dropped


def _is_finished(prefix, settings):
    if not prefix.with_suffix(".json").exists():
        return False
    try:
        found = TokenFile(prefix)
    except UserError:
        return False
    return found.metadata is not None and found.metadata.get("settings") == settings
