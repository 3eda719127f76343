"""The sentence-pair task from the embedded corpus: its rows, and that nothing but the relation of two texts tells."""

from collections import defaultdict
from itertools import islice

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from common.data.embedded import documents_of_packages, embedded_documents
from common.data.follows import Passage, build_follows, find_passage, follows_rows, make_rows
from common.data.sources import split

SENTENCES = (
    "The file is opened by its name.",
    "It is read line by line until its end.",
    "Short one.",
    "Errors are told to whoever has called.",
)


def sentence(number):
    return f"The sentence with the number {number} stands here."


def test_a_passage_is_two_neighbours_and_another_sentence():
    document = " ".join(SENTENCES)
    passage = find_passage("one", document, set())
    assert (passage.first, passage.second, passage.other) == (SENTENCES[0], SENTENCES[1], SENTENCES[3])
    assert find_passage("one", document, set()) == passage
    seen = set()
    find_passage("one", document, seen)
    assert seen == set(SENTENCES) - {"Short one."} and find_passage("one", document, seen) is None
    assert find_passage("one", document, {SENTENCES[3]}) is None  # two sentences do not suffice
    assert find_passage("one", " ".join((SENTENCES[0],) * 3), set()) is None


def test_every_first_text_stands_with_either_label_and_never_meets_another_package():
    members = [
        Passage(
            f"package {n % 3}", sentence(n), sentence(100 + n) + " More" * (n % 5), sentence(200 + n) + " It" * (n % 4)
        )
        for n in range(31)
    ]
    package = {text: m.package for m in members for text in (m.first, m.second, m.other)}
    own = {(m.first, m.other) for m in members}
    rows = make_rows(members)
    right = {(m.first, m.second) for m in members}
    assert all(((first, second) in right) == bool(label) for first, second, label in rows)
    assert all(package[first] == package[second] for first, second, _ in rows)
    assert not own & {(first, second) for first, second, _ in rows}
    labels = defaultdict(list)
    for first, _, label in rows:
        labels[first].append(label)
    assert all(sorted(found) == [0, 1] for found in labels.values()) and len(rows) == 2 * len(members)
    assert len({second for _, second, _ in rows}) == len(rows)
    assert make_rows(reversed(members)) == rows
    assert make_rows(members[:1]) == []  # a package of one document has no other


@pytest.fixture(scope="module")
def corpus():
    return list(islice(documents_of_packages(), 6000))


@pytest.mark.slow
def test_packages_are_named_and_the_documents_are_the_corpus(corpus):
    assert [text for _, text in corpus] == list(islice(embedded_documents(), 6000))
    assert {"stdlib", "accelerate"} & {package for package, _ in corpus}


@pytest.mark.slow
def test_validation_rows_come_from_documents_that_pretraining_holds_out(corpus):
    rows = follows_rows(corpus)
    held_out = defaultdict(list)
    for is_held_out, text in split([text for _, text in corpus], 5.0):
        held_out[is_held_out].append(text)
    whole = {name: "\n".join(held_out[name == "validation"]) for name in rows}
    for name, found in rows.items():
        assert len(found) > 50 and all(first in whole[name] and second in whole[name] for first, second, _ in found)
    texts = {name: {text for row in found for text in row[:2]} for name, found in rows.items()}
    assert not texts["train"] & texts["validation"]


@pytest.mark.slow
def test_the_second_text_alone_tells_little(corpus):
    """Logistic regression: below 65 % on its words, as openings of documents follow nothing; nothing on lengths."""
    rows = follows_rows(corpus)
    labels = {name: np.array([label for *_, label in found]) for name, found in rows.items()}
    texts = {name: [second for _, second, _ in found] for name, found in rows.items()}
    words = make_pipeline(CountVectorizer(token_pattern=r"\S+", min_df=2), LogisticRegression(C=0.1, max_iter=300))
    by_words = words.fit(texts["train"], labels["train"]).score(texts["validation"], labels["validation"])

    def lengths(found):
        sizes = np.array([(len(a), len(b), abs(len(a) - len(b)), len(a) * len(b) / 100) for a, b, _ in found])
        return sizes / 100

    by_length = LogisticRegression(max_iter=300).fit(lengths(rows["train"]), labels["train"])
    by_length = by_length.score(lengths(rows["validation"]), labels["validation"])
    print(f"validation accuracy by words {by_words:.3f}, by lengths {by_length:.3f}; rows {len(labels['validation'])}")
    assert by_words < 0.65 and by_length < 0.5 + 3 * 0.5 / np.sqrt(len(labels["validation"]))


@pytest.mark.slow
def test_the_task_is_built_once(tmp_path, monkeypatch):
    monkeypatch.setattr("common.data.follows.documents_of_packages", lambda: islice(documents_of_packages(), 800))
    folder = build_follows(tmp_path)
    content = {path.name: path.read_text() for path in folder.iterdir()}
    assert set(content) == {"train.tsv", "validation.tsv"}
    assert content["train.tsv"].startswith("index\tsentence1\tsentence2\tlabel\n0\t")
    assert all(line.count("\t") == 3 for text in content.values() for line in text.splitlines())
    (folder / "train.tsv").write_text("kept")
    assert build_follows(tmp_path) == folder and (folder / "train.tsv").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
