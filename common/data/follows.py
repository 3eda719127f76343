"""A sentence-pair task that is on every machine: does the second text follow the first in the same document?

The first text is the beginning of a sentence of the embedded corpus. The second is its end, or the end of a sentence
of another document of the same package, of about the same length.

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

VERSION = 2  # of what is built; a new one makes caches build again
SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[A-Z])")
WORDS = range(12, 41)  # in a sentence that is used


@dataclass(frozen=True)
class Passage:
    """The two parts of a sentence."""

    package: str
    first: str
    second: str


def find_passage(package: str, document: str, seen: set[str]) -> Passage | None:
    """Choose a sentence of a document, and cut it somewhere in its middle third; its hash decides.

    Args:
        package: where the document comes from.
        document: its text.
        seen: sentences of other passages, and their parts, which are not used again; this one's are added.
    Returns:
        Passage, or None where no sentence can be used.
    """
    sentences = [
        text
        for text in SENTENCE_END.split(document)
        if text.endswith((".", "!", "?")) and len(text.split()) in WORDS and text not in seen
    ]
    if not sentences:
        return None
    sentence = sentences[document_hash(document) % len(sentences)]
    words = sentence.split()
    place = len(words) // 3 + document_hash(sentence) % (len(words) // 3 + 1)
    passage = Passage(package, " ".join(words[:place]), " ".join(words[place:]))
    if passage.first in seen or passage.second in seen:
        return None
    seen |= {sentence, passage.first, passage.second}
    return passage


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
