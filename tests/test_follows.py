"""The sentence-pair task from the embedded corpus: its rows, and that nothing but the relation of two texts tells."""

from collections import Counter, defaultdict
from itertools import islice

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from common.data.embedded import documents_of_packages, embedded_documents
from common.data.follows import Passage, build_follows, find_passage, follows_rows, make_rows
from common.data.sources import split

SENTENCE = "It is read line by line until the end of the file is reached."
DOCUMENT = f"The file is opened by name. {SENTENCE} Then it is closed. Errors are told."


def sentence(number):
    return f"The sentence with the number {number} stands here."


def test_a_passage_is_a_sentence_cut_in_two():
    passage = find_passage("one", DOCUMENT, set())
    assert f"{passage.first} {passage.second}" == SENTENCE and passage.package == "one"
    assert 4 <= len(passage.first.split()) <= 9
    assert find_passage("one", DOCUMENT, set()) == passage
    assert find_passage("one", DOCUMENT, {SENTENCE}) is None  # what is left are sentences of too few words


def test_every_text_stands_once_with_either_label_and_never_meets_another_package():
    members = [Passage(f"package {n % 3}", sentence(n), sentence(100 + n)) for n in range(31)]
    package = {text: member.package for member in members for text in (member.first, member.second)}
    rows = make_rows(members)
    right = {(member.first, member.second) for member in members}
    assert all(((first, second) in right) == bool(label) for first, second, label in rows)
    assert all(package[first] == package[second] for first, second, _ in rows)
    for side in (0, 1):
        labels = defaultdict(list)
        for row in rows:
            labels[row[side]].append(row[2])
        assert all(sorted(found) == [0, 1] for found in labels.values())
    assert len(rows) == 4 * sum(size // 2 for size in Counter(member.package for member in members).values())
    assert make_rows(reversed(members)) == rows


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
def test_what_needs_no_comparison_of_the_two_texts_tells_nothing(corpus):
    """Words of either text, its first word, lengths and their difference: logistic regression stays at chance."""
    rows = follows_rows(corpus)
    labels = {name: np.array([label for *_, label in found]) for name, found in rows.items()}
    marked = {
        name: [
            " ".join([*(f"a_{word}" for word in a.split()), *(f"b_{word}" for word in b.split())])
            + f" first_a_{a.split()[0]} first_b_{b.split()[0]}"
            for a, b, _ in found
        ]
        for name, found in rows.items()
    }
    words = make_pipeline(CountVectorizer(token_pattern=r"\S+", min_df=2), LogisticRegression(max_iter=300))
    words.fit(marked["train"], labels["train"])
    by_words = words.score(marked["validation"], labels["validation"])

    def lengths(found):
        sizes = np.array([(len(a), len(b), abs(len(a) - len(b)), len(a) * len(b) / 100) for a, b, _ in found])
        return sizes / 100

    by_length = LogisticRegression(max_iter=300).fit(lengths(rows["train"]), labels["train"])
    by_length = by_length.score(lengths(rows["validation"]), labels["validation"])
    print(f"validation accuracy by words {by_words:.3f}, by lengths {by_length:.3f}; rows {len(labels['validation'])}")
    bound = 0.5 + 3 * 0.5 / np.sqrt(len(labels["validation"]))
    assert by_words < bound and by_length < bound


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
