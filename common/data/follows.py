"""A sentence-pair task that is on every machine: does the second text follow the first in the same document?

Both are sentences of the embedded corpus. A second one that does not follow is a sentence of another document of the
same package, of about the same length.

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

VERSION = 3  # of what is built; a new one makes caches build again
SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[A-Z])")
WORDS = range(6, 41)  # in a sentence that is used


@dataclass(frozen=True)
class Passage:
    """Two sentences of a document that stand next to each other, and another one of it."""

    package: str
    first: str
    second: str
    other: str


def find_passage(package: str, document: str, seen: set[str]) -> Passage | None:
    """Choose sentences of a document; its hash decides.

    Args:
        package: where the document comes from.
        document: its text.
        seen: sentences of other passages, which are not used again; this one's are added.
    Returns:
        Passage, or None where the sentences do not suffice.
    """
    sentences = SENTENCE_END.split(document)
    usable = [
        number
        for number, text in enumerate(sentences)
        if text.endswith((".", "!", "?")) and len(text.split()) in WORDS and text not in seen
    ]
    places = [number for number in usable if number - 1 in usable]
    if not places or len({sentences[number] for number in usable}) < max(3, len(usable)):
        return None
    place = places[document_hash(document) % len(places)]
    others = [number for number in usable if number not in (place - 1, place)]
    other = others[document_hash(document[::-1]) % len(others)]
    passage = Passage(package, sentences[place - 1], sentences[place], sentences[other])
    seen |= {passage.first, passage.second, passage.other}
    return passage


def make_rows(passages: Iterable[Passage]) -> list[tuple[str, str, int]]:
    """Right and wrong pairs: each first text once with its second, and once with the other sentence of a passage.

    Within a package, the second texts and the other sentences are brought together by the order of their lengths.

    Returns:
        list of (first, second, label), 1 where the second follows the first; in the order of a hash.
    """
    packages = defaultdict(list)
    for passage in passages:
        packages[passage.package].append(passage)
    rows = []
    for members in packages.values():
        members.sort(key=lambda passage: (len(passage.second), passage.second))
        wrong = sorted(members, key=lambda passage: (len(passage.other), passage.other))
        for number, passage in enumerate(members):
            if wrong[number] is passage:  # its own document's: change places with the next
                following = (number + 1) % len(wrong)
                wrong[number], wrong[following] = wrong[following], wrong[number]
        for passage, stranger in zip(members, wrong, strict=True):
            if stranger is not passage:
                rows += [(passage.first, passage.second, 1), (passage.first, stranger.other, 0)]
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
