"""A sentence-pair task that is on every machine: does the second text follow the first in the same document?

Both come from the embedded corpus. The wrong second text is taken from another document of the same package and has
about the same length.

    python -m common.data.follows [--cache_dir runs/cache]      prints the folder with train.tsv and validation.tsv
"""

import argparse
import hashlib
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common.arguments import DataArguments
from common.data.embedded import documents_of_packages, embedded_fingerprint
from common.data.prepare import DEFAULT_CACHE_DIR
from common.data.sources import document_hash, split
from common.errors import run_main

VERSION = 1  # of what is built; a new one makes caches build again
SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[A-Z])")
WORDS = range(6, 41)  # in a sentence
SENTENCES = 2  # at most, on either side


@dataclass(frozen=True)
class Passage:
    """Two texts that stand next to each other in a document."""

    package: str
    first: str
    second: str


def find_passage(package: str, document: str, seen: set[str]) -> Passage | None:
    """Cut a document between two sentences, at a place that its hash decides.

    Args:
        package: where it comes from.
        document: its text.
        seen: sentences of other passages, which are not used again; this one's are added.
    Returns:
        Passage, or None where no two neighbouring sentences can be used.
    """
    sentences = SENTENCE_END.split(document)
    usable = [text.endswith((".", "!", "?")) and len(text.split()) in WORDS and text not in seen for text in sentences]
    places = [place for place in range(1, len(sentences)) if usable[place - 1] and usable[place]]
    if not places:
        return None
    place = places[document_hash(document) % len(places)]
    begin, end = place - 1, place + 1
    while begin > 0 and place - begin < SENTENCES and usable[begin - 1]:
        begin -= 1
    while end < len(sentences) and end - place < SENTENCES and usable[end]:
        end += 1
    seen.update(sentences[begin:end])
    return Passage(package, " ".join(sentences[begin:place]), " ".join(sentences[place:end]))


def make_rows(passages: Iterable[Passage]) -> list[tuple[str, str, int]]:
    """Right and wrong pairs, such that no text alone tells which is which.

    Passages of a package are coupled by the length of their second texts. A couple gives four rows: each first text
    once with its own second text and once with the other's.

    Returns:
        list of (first, second, label), 1 where the second follows the first; in the order of a hash.
    """
    packages = defaultdict(list)
    for passage in passages:
        packages[passage.package].append(passage)
    rows = []
    for members in packages.values():
        members.sort(key=lambda passage: (len(passage.second), passage.second))
        for one, other in zip(members[0::2], members[1::2], strict=False):
            rows += [(a.first, b.second, int(a is b)) for a in (one, other) for b in (one, other)]
    return sorted(rows, key=lambda row: document_hash("\t".join(row[:2])))


def follows_rows(documents: Iterable[tuple[str, str]]) -> dict[str, list[tuple[str, str, int]]]:
    """Training and validation rows of the task; no document has part in both.

    Validation rows come from the documents that run_pretraining.py holds out by default.

    Args:
        documents: (package, text).
    Returns:
        dict: "train" and "validation", as make_rows.
    """
    packages, texts = zip(*documents, strict=True)
    seen, passages = set(), {"train": [], "validation": []}
    held_out = split(texts, DataArguments.validation_split_percentage)
    for package, (is_held_out, text) in zip(packages, held_out, strict=True):
        if passage := find_passage(package, text, seen):
            passages["validation" if is_held_out else "train"].append(passage)
    return {name: make_rows(members) for name, members in passages.items()}


def build_follows(cache: Path) -> Path:
    """Find the task in the cache, or build it there: a few seconds.

    Args:
        cache: folder for prepared data.
    Returns:
        Path of the folder with train.tsv and validation.tsv: index, sentence1, sentence2, label.
    """
    facts = f"{VERSION} {embedded_fingerprint()} {DataArguments.validation_split_percentage}"
    folder = cache / f"follows-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".follows-", dir=cache))
    try:
        for name, rows in follows_rows(documents_of_packages()).items():
            lines = (f"{number}\t{first}\t{second}\t{label}\n" for number, (first, second, label) in enumerate(rows))
            text = "".join(["index\tsentence1\tsentence2\tlabel\n", *lines])
            (unfinished / f"{name}.tsv").write_text(text, encoding="utf-8")
        unfinished.chmod(0o755)
        if not folder.exists():  # another process may have been faster; it has written the same
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def main():
    """Build the task and print where it lies."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cache_dir", default=DEFAULT_CACHE_DIR, help="Where prepared data are kept.")
    print(build_follows(Path(parser.parse_args().cache_dir).expanduser()))


if __name__ == "__main__":
    run_main(main)
