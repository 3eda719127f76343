"""Where text comes from: files and archives, addresses, datasets of the hub, Megatron's token files.

Each is an object with `source`, the number of the --input that named it (datasets come after them), and
    identity()      JSON value: what decides its documents
    size()          bytes that have to be read, None where nobody knows
    missing()       bytes of these that have to be downloaded and kept first
    fetch(say)      have it here
    blocks(args, bad_records, first, step)
                    its documents as read_blocks yields them, or, where several shards share it, the part of shard
                    number first, from 0, of step
    release()       remove what fetch left behind
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, zip_longest
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from common.data.blocks import checked_text, gathered, missing_column
from common.data.documents import expand_files, read_blocks
from common.data.hub import load_dataset, reading
from common.data.token_files import MAGIC, TokenFile
from common.data.tokenizers import TokenizerKind, load_tokenizer
from common.errors import UserError
from common.prepare.downloads import download, read_checksums, remote_size

ANY = TokenizerKind("tokenizer", (), "a tokenizer", train=None)  # what it is for is not known yet
# Files on the hub that stand for a corpus whose own host has gone (Megatron-DeepSpeed read the-eye.eu):
MIRRORS = {"pile": ("monology/pile-uncopyrighted", [f"train/{number:02}.jsonl.zst" for number in range(30)])}


@dataclass(frozen=True)
class TextFile:
    """A file that is here, or an archive of several."""

    path: Path
    source: int = 0

    def identity(self):
        facts = self.path.stat()
        return [self.path.name, facts.st_size, facts.st_mtime_ns]

    def size(self):
        return self.path.stat().st_size

    def missing(self):
        return 0

    def fetch(self, say):
        pass

    def blocks(self, args, bad_records, first, step):
        found = read_blocks([self.path], args.text_column, args.document_separator, bad_records)
        # another shard begins each time, so that many small blocks are dealt evenly, too
        return (block.dealt((first - number) % step, step) for number, block in enumerate(found))

    def release(self):
        pass


@dataclass(frozen=True)
class TokenFileText(TextFile):
    """A Megatron .bin with its .idx, whose documents are decoded by the tokenizer that made it."""

    def identity(self):
        return [*super().identity(), *TextFile(self.path.with_suffix(".idx")).identity()]

    def blocks(self, args, bad_records, first, step):
        return gathered(self._documents(args, first, step))

    def _documents(self, args, first, step):
        named = args.input_tokenizer_name or args.tokenizer_name
        if not named:
            raise UserError(f"{self.path}: token ids: name the tokenizer that made them with --input_tokenizer_name")
        tokenizer = load_tokenizer(named, args.cache_dir, args.trust_remote_code, ANY)
        file = TokenFile(self.path.with_suffix(""))
        for document in range(first, file.num_documents, step):
            sequences = slice(*file.documents[document : document + 2])
            ids = [
                token
                for start, length in zip(file.starts[sequences], file.lengths[sequences], strict=True)
                for token in file.tokens[start : start + length].tolist()
            ]
            if ids and ids[-1] == tokenizer.eos_token_id:
                ids.pop()
            if ids and max(ids) >= len(tokenizer):
                raise UserError(f"{self.path}: token {max(ids)} is none of --input_tokenizer_name {named}")
            if text := tokenizer.decode(ids, clean_up_tokenization_spaces=False):
                yield text, ""


@dataclass(frozen=True)
class RemoteFile:
    """A file at an address, which is downloaded when its turn comes."""

    url: str
    folder: Path
    sha256: str | None = None
    source: int = 0
    headers: dict = field(default_factory=dict, repr=False)

    @property
    def path(self):
        """Where it is put."""
        return self.folder / (PurePosixPath(unquote(urlsplit(self.url).path)).name or "download")

    def identity(self):
        return [self.url, self.sha256]

    def size(self):
        return self.path.stat().st_size if self.path.exists() else self._promised

    @cached_property
    def _promised(self):
        return remote_size(self.url, self.headers)

    def missing(self):
        return 0 if self.path.exists() else self._promised

    def fetch(self, say):
        download(self.url, self.path, say, self.sha256, self.headers)

    def blocks(self, args, bad_records, first, step):
        return TextFile(self.path).blocks(args, bad_records, first, step)

    def release(self):
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class HubDataset:
    """A split of a dataset on the hub, or of a folder laid out as one, read row by row as it arrives."""

    name: str
    config: str | None
    split: str
    cache_dir: str | None = None
    source: int = 0

    @property
    def path(self):
        """Its name, as that of a file would be."""
        return Path(self.name)

    def identity(self):
        return [self.name, self.config, self.split]

    def size(self):
        return None

    def missing(self):
        return 0

    def fetch(self, say):
        pass

    def release(self):
        pass

    def blocks(self, args, bad_records, first, step):
        return gathered(self._documents(args, bad_records, first, step))

    def _documents(self, args, bad_records, first, step):
        what = f"--dataset_name {self.name}"
        with reading(what, "check the name, --dataset_config_name and the network"):
            splits = load_dataset(self.name, self.config, self.cache_dir, streaming=True)
            if self.split not in splits:
                raise UserError(f"{what}: has no split {self.split}; --dataset_split takes {', '.join(splits)}")
            rows = splits[self.split]
            number, jump = first, step
            if rows.num_shards % step == 0:  # its files are dealt, not its rows
                rows, number, jump = rows.shard(step, first), 0, 1
            for row in islice(rows, number, None, jump):
                where = f"{what}: record {number}" if jump == step else f"{what}: a record"
                number += jump
                if args.text_column not in row:
                    raise UserError(f"{what}: {missing_column(args.text_column, row)}")
                meta = row.get("meta")
                label = meta.get("pile_set_name") if isinstance(meta, dict) else None
                for text in checked_text(row[args.text_column], args.text_column, where, bad_records):
                    if text := text.strip():
                        yield text, label if isinstance(label, str) else ""


def is_remote(pattern):
    """Whether what an --input names has to be downloaded: an address, or a corpus that no file is called like."""
    return _is_mirrored(pattern) or urlsplit(pattern).scheme in ("http", "https")


def _is_mirrored(pattern):
    return pattern in MIRRORS and not Path(pattern).exists()


def find_inputs(args, folder):
    """The inputs that a command line names, each file once.

    Args:
        args: PrepareArguments; folder: Path for downloads.
    Returns:
        list, in the order of --input, files of one pattern sorted; then the datasets.
    Raises:
        UserError: a file that is not there; no input at all.
    """
    checksums = read_checksums(args.checksums) if args.checksums else {}
    found = {}
    for source, pattern in enumerate(args.input or []):
        if _is_mirrored(pattern):
            for one in _mirrored(*MIRRORS[pattern], folder, checksums, source):
                found.setdefault(one.url, one)
        elif is_remote(pattern):
            one = RemoteFile(pattern, folder, source=source)
            found.setdefault(pattern, RemoteFile(pattern, folder, checksums.get(one.path.name), source))
        else:
            for path in expand_files(pattern):
                if (one := _local(path, source)) is not None:
                    found.setdefault(path, one)
    names = args.dataset_name or []
    for source, (name, config) in enumerate(zip_longest(names, args.dataset_config_name or []), len(args.input or [])):
        split = name, config, args.dataset_split
        found[split] = HubDataset(*split, args.cache_dir, source)
    if not found:
        raise UserError("no text: name files, folders, globs or addresses with --input, or a --dataset_name")
    names = [one.path.name for one in found.values() if isinstance(one, RemoteFile)]
    if len(names) > len(set(names)):
        raise UserError("two addresses end in the same file name; download one of them yourself")
    return list(found.values())


def _local(path, source):
    """The input for a file; None for an index, which goes with its .bin."""
    if path.suffix == ".idx" and path.with_suffix(".bin").exists():
        return None
    if path.suffix == ".bin" and path.with_suffix(".idx").exists():
        with open(path.with_suffix(".idx"), "rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                return TokenFileText(path, source)
    return TextFile(path, source)


def _mirrored(repository, names, folder, checksums, source):
    from huggingface_hub import get_token, hf_hub_url

    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    for name in names:
        url = hf_hub_url(repository, name, repo_type="dataset")
        yield RemoteFile(url, folder, checksums.get(Path(name).name), source, headers)
