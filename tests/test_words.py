"""Whole-word and n-gram masking against one word after another, written plainly."""

from collections import Counter

import numpy as np
import pytest
from test_batches import chi_square, limit_of

from common.data.batches import Masking
from common.data.masking import (
    CHOICE_STREAM,
    CORRUPTION_STREAM,
    NOT_TEXT,
    RUN_STREAM,
    derive_key,
    random_halves,
    replace_tokens,
)
from common.data.packing import DocumentRows, Frame
from common.data.tokenizers import CAUSAL, MASKED, load_tokenizer
from common.data.words import choose_words, word_begins
from plain import TOKENIZER, token_file

WIDTH = 64  # tokens in a row of documents
TARGETS = ("masked_positions", "masked_labels", "masked_weights")


def random_rows(seed, rows, width):
    """Rows of several documents with special tokens between them and padding behind, and where words begin."""
    chance = np.random.default_rng(seed)
    is_text, begins = np.zeros((rows, width), bool), np.zeros((rows, width), bool)
    for row in range(rows):
        place, used = 0, chance.integers(0, width + 1)
        while place < used:
            end = min(used, place + 2 + int(chance.integers(0, 40)))
            is_text[row, place + 1 : end - 1] = True  # [CLS] text [SEP]
            place = end
        begins[row] = chance.random(width) < chance.choice([0.1, 0.6, 1.0])
    return is_text, begins


def plain_choice(is_text, begins, key, k, most):
    """The chosen positions of one row, with Python's lists; key: uint64 [1]."""
    words, adjacent = [], []
    for place in np.flatnonzero(is_text):
        follows_text = place > 0 and is_text[place - 1]
        if begins[place] or not follows_text:
            adjacent.append(bool(follows_text))  # to the word before it
            words.append([int(place)])
        else:
            words[-1].append(int(place))
    bits = (1 << (len(is_text) - 1).bit_length()) - 1
    numbers = random_halves(derive_key(key, CHOICE_STREAM), len(is_text))[0]
    draws = random_halves(derive_key(key, RUN_STREAM), len(is_text))[0]
    order = sorted(range(len(words)), key=lambda word: (int(numbers[word]) & 0x7FFFFFFF & ~bits) | word)
    chosen = set()
    for word in order:
        if len(chosen) == k:
            break
        reach = 1
        while reach < most and word + reach < len(words) and adjacent[word + reach]:
            reach += 1
        weights = [1 / n for n in range(1, reach + 1)]
        bounds = [int(sum(weights[:n]) / sum(weights) * 2**32) for n in range(1, reach)]
        number = 1 + sum(int(draws[word]) >= bound for bound in bounds)
        while number and len(chosen) + sum(map(len, words[word : word + number])) > k:
            number -= 1
        run = [place for part in words[word : word + number] for place in part]
        if not chosen.intersection(run):
            chosen.update(run)
    for word in order:
        for place in words[word]:
            if len(chosen) < k:
                chosen.add(place)
    return sorted(chosen)


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("k", [1, 7, 19, 51])
@pytest.mark.parametrize("fewer", [False, True])
def test_equal_to_one_word_after_another(most, k, fewer):
    is_text, begins = random_rows(k, 1000, 128)
    keys = derive_key(5, np.arange(1000))
    limits = np.random.default_rng(1).integers(1, k + 1, 1000) if fewer else np.full(1000, k)
    found = choose_words(is_text, begins, keys, k, most, limits if fewer else None)
    assert found.shape == (1000, k)
    for row in range(1000):
        expected = plain_choice(is_text[row], begins[row], keys[row : row + 1], limits[row], most)
        assert found[row][found[row] < NOT_TEXT].tolist() == expected
        assert len(expected) == min(limits[row], is_text[row].sum())


def plain_tokens(is_text, key, k):
    """The chosen positions of one row where every token is chosen by itself."""
    bits = (1 << (len(is_text) - 1).bit_length()) - 1
    numbers = random_halves(derive_key(key, CHOICE_STREAM), len(is_text))[0]
    places = [int(place) for place in np.flatnonzero(is_text)]
    return sorted(sorted(places, key=lambda place: (int(numbers[place]) & 0x7FFFFFFF & ~bits) | place)[:k])


def plain_masking(document_tokens, begins_word, key, k, mode):
    """A row of documents, as (ids, positions, labels, weights): lists, one token after another."""
    ids, is_text = [], []
    for tokens in document_tokens:
        ids += [2, *tokens, 3]
        is_text += [False, *[True] * len(tokens), False]
    ids += [0] * (WIDTH - len(ids))
    is_text += [False] * (WIDTH - len(is_text))
    if mode == "token":
        chosen = plain_tokens(is_text, key, k)
    else:
        begins = [bool(begins_word[token]) for token in ids]
        chosen = plain_choice(np.array(is_text), begins, key, k, {"whole_word": 1, "ngram": 3}[mode])
    labels = [ids[place] for place in chosen]
    for place, number in zip(chosen, random_halves(derive_key(key, CORRUPTION_STREAM), k)[0], strict=False):
        share, token = divmod(int(number) * 10 * len(begins_word) >> 32, len(begins_word))  # of ten, and a token
        ids[place] = 4 if share < 8 else token if share == 8 else ids[place]
    missing = k - len(chosen)
    return ids, chosen + chosen[:1] * missing, labels + labels[:1] * missing, [1] * len(chosen) + [0] * missing


@pytest.mark.parametrize("mode", ["token", "whole_word", "ngram"])
def test_batches_of_a_thousand_documents_equal_a_plain_version(tmp_path, mode):
    """From documents to what a model is given: which tokens it must predict, and what stands in their place."""
    chance, vocabulary = np.random.default_rng(7), 300
    file = token_file(chance.integers(1, 90, 1000))
    file.tokens = chance.integers(5, vocabulary, len(file.tokens))
    begins_word = chance.random(vocabulary) < 0.6
    rows = DocumentRows(file, Frame.for_masked(TOKENIZER), WIDTH, tmp_path)
    words = {"word_begins": None if mode == "token" else begins_word, "run_words": 3 if mode == "ngram" else 1}
    masking, keys = Masking(0.3, vocabulary, 4, **words), derive_key(5, np.arange(len(rows)))
    batch, k = masking.make_batch(rows, np.arange(len(rows)), keys), round(0.3 * WIDTH)
    seen = 0
    for row in range(len(rows)):
        segments = range(rows.row_ends[row - 1] if row else 0, rows.row_ends[row])
        texts = [file.tokens[rows.starts[n] : rows.starts[n] + rows.lengths[n]].tolist() for n in segments]
        found = [batch[name][row].tolist() for name in ("input_ids", *TARGETS)]
        assert found == list(plain_masking(texts, begins_word, keys[row : row + 1], k, mode))
        seen += sum(map(len, texts))
    assert seen == file.lengths.sum() and (batch["masked_weights"] == 0).any()


def test_a_row_is_masked_alone_as_in_company():
    is_text, begins = random_rows(3, 200, 64)
    keys = derive_key(1, np.arange(200))
    together = choose_words(is_text, begins, keys, 10, 3)
    for row in range(200):
        alone = choose_words(is_text[row : row + 1], begins[row : row + 1], keys[row : row + 1], 10, 3)
        assert (alone[0] == together[row]).all()


def test_words_stay_whole_and_runs_are_as_long_as_said():
    rows, width, k = 4000, 512, 12
    is_text, begins = np.ones((rows, width), bool), np.zeros((rows, width), bool)
    begins[:, ::2] = True  # words of two tokens
    for most in (1, 3):
        found = choose_words(is_text, begins, derive_key(9, np.arange(rows)), k, most).astype(np.int64)
        assert (found[:, ::2] % 2 == 0).all() and (found[:, 1::2] == found[:, ::2] + 1).all()
    first = choose_words(is_text, begins, derive_key(9, np.arange(rows)), 6, 3).astype(np.int64)[:, ::2] // 2
    runs = Counter()  # of rows with one run only: it fills the row or the next ones do
    for words in first:
        lengths = np.diff(np.flatnonzero(np.concatenate([[True], np.diff(words) > 1, [True]])))
        runs[tuple(sorted(lengths.tolist()))] += 1
    # three words: one run of 3, or 2 then 1 (one that draws more is cut to it), or 1 and then what fits two places
    one, two, three = 6 / 11, 3 / 11, 2 / 11
    expected = {(3,): three, (1, 2): two + one * (two + three), (1, 1, 1): one * one}
    counts = np.array([runs[kind] for kind in expected])
    assert chi_square(counts, rows * np.array(list(expected.values()))) < limit_of(2)


@pytest.mark.parametrize(
    ("shares", "expected"), [((0.8, 0.1), (8, 1, 10)), ((1.0, 0.0), (1, 0, 1)), ((0, 0.25), (0, 1, 4))]
)
def test_what_becomes_of_the_chosen(data_folder, shares, expected):
    tokenizer = load_tokenizer(str(data_folder / "vocab" / "bert-base-uncased"), kind=MASKED)
    replaced = Masking.for_tokenizer(tokenizer, 0.15, "token", *shares).replaced
    assert replaced == expected
    rows, vocabulary = 20000, 50
    ids = np.full((rows, 8), 7)
    chosen = np.tile(np.arange(4, dtype=np.uint32), (rows, 1))
    replace_tokens(ids, chosen, derive_key(2, np.arange(rows)), vocabulary, 49, replaced)
    assert (ids[:, 4:] == 7).all()
    counts = np.bincount(ids[:, :4].ravel(), minlength=vocabulary)
    others = shares[1] / vocabulary
    expected = (
        np.full(vocabulary, others) + np.eye(vocabulary)[49] * shares[0] + np.eye(vocabulary)[7] * (1 - sum(shares))
    )
    there = expected > 1e-9
    assert counts[~there].sum() == 0
    if there.sum() > 1:
        assert chi_square(counts[there], 4 * rows * expected[there]) < limit_of(there.sum() - 1)


@pytest.mark.parametrize(("name", "kind"), [("bert-base-cased", MASKED), ("opt", CAUSAL)])
def test_which_tokens_begin_a_word(data_folder, name, kind):
    tokenizer = load_tokenizer(str(data_folder / "vocab" / name), kind=kind)
    ids = tokenizer(" Uncommonly tokenizable words", add_special_tokens=False).input_ids
    begins = word_begins(tokenizer)[ids]
    assert len(ids) > 3 == begins.sum() and begins[0]
    words = [tokenizer.decode(part).strip() for part in np.split(ids, np.flatnonzero(begins)[1:])]
    assert words == ["Uncommonly", "tokenizable", "words"]
