"""What preparing will take of the disk and of memory, said before it begins."""

import shutil

from common.errors import UserError

EXPANSION = {".gz": 3.0, ".bz2": 4.0, ".xz": 4.0, ".zst": 3.5, ".zip": 3.0, ".parquet": 2.0}  # of text, usual
TOKEN_BYTES_PER_BYTE = 0.6  # of text: 2 bytes a token, 4 characters in it, with index and what is known of documents
PROCESS_BYTES = 500_000_000  # at most, unless a single document is of this size
SPARE = 1.1


def announce(shards, chosen, folder, workers, command, args, say):
    """Say what is to come, and refuse what the disk has no room for.

    Args:
        shards: list of all Shard; chosen: list of those to be done; folder: Path, the output's; workers: processes;
        command: "download", "tokenize" or "all"; args: PrepareArguments; say: function that prints a line.
    Raises:
        UserError: less is free than will be written.
    """
    todo = [shard for shard in chosen if not (folder / "shards" / f"{shard.name}.json").exists()]
    inputs = {id(one): one for shard in todo for one, *_ in shard.parts}.values()
    unknown = sum(one.size() is None for one in inputs)
    text = sum(map(text_bytes, inputs))
    downloads = sum(one.missing() or 0 for one in inputs)
    written = downloads
    if command != "download":
        if args.remove_downloads:  # one shard's at a time
            written = max([0, *(sum(one.missing() or 0 for one, *_ in shard.parts) for shard in todo)])
        written += text * TOKEN_BYTES_PER_BYTE * (2 if command == "all" else 1)
    free = shutil.disk_usage(folder).free
    also = f", and {unknown} of unknown size" if unknown else ""
    known = f"{_number(len(inputs) - unknown, 'input')} of about {_size(text)} of text"
    say(f"{len(todo)} of {_number(len(shards), 'shard')} to do: {known}{also}")
    if downloads:
        say(f"downloads: {_size(downloads)}")
    say(f"disk: about {_size(written)}, with downloads ({_size(free)} free)")
    if command != "download":
        processes = _number(workers, "process", "es")
        say(f"memory: {processes} of up to {_size(PROCESS_BYTES)}, and as much for the program, whatever the text")
    if written * SPARE > free:
        raise UserError(
            f"{folder}: about {_size(written)} are needed and {_size(free)} are free: make room, give an --output_dir "
            "elsewhere, or fewer shards"
        )


def text_bytes(one):
    """About how many bytes of text an input holds; 0 where nobody knows. Args: one: of common.prepare.inputs."""
    return (one.size() or 0) * EXPANSION.get(one.path.suffix.lower(), 1.0)


def shard_bytes(shard):
    """The same of a Shard."""
    return sum(text_bytes(one) / step for one, _, step in shard.parts)


def _number(count, noun, plural="s"):
    return f"{count:,} {noun}{plural if count != 1 else ''}"


def _size(number):
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"
