"""The word cache gives the Rust tokenizer's ids, for any text, or is not used."""

import json
from array import array
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from common.data.tokenizers import corpus_encoder
from common.data.tokenizing import tokenize
from common.data.word_cache import SAMPLE, CheckedEncoder, WordCache, can_be_cached
from common.data.wordpiece import SPECIAL_TOKENS, train_wordpiece, wordpiece_tokenizer

TEXTS = [topics[name] for name in sorted(topics)]
LETTERS = [
    *"abcdefghijklmnopqrstuvwxyzABCDE0123456789",
    *"éàßıİΣσ数漢字\u0301\u0308한ไह",
    *"!\"#'()*,-./:;?@[]_`{|}~—€",
]
PIECES = ["the", "The", "cat", "##s", "##at", "state", "##ment", "re", "##turn", "value", "mask", "[unused1]", "naïve"]
VOCABULARY = list(dict.fromkeys([*SPECIAL_TOKENS, *PIECES, *LETTERS, *("##" + letter for letter in LETTERS[:60])]))


def trained():
    return train_wordpiece(TEXTS, 1200).backend_tokenizer


def made(lowercase):
    return wordpiece_tokenizer(VOCABULARY, lowercase=lowercase).backend_tokenizer


def odd(**options):
    """A WordPiece with every option off its usual value."""
    model = models.WordPiece(
        {token: 70_000 - number for number, token in enumerate(VOCABULARY)},
        unk_token="[UNK]",
        max_input_chars_per_word=7,
        continuing_subword_prefix="##",
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(**options)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


BACKENDS = {
    "trained": trained(),
    "uncased": made(True),
    "cased": made(False),
    "cased, accents stripped": odd(lowercase=False, strip_accents=True),
    "uncased, accents kept": odd(lowercase=True, strip_accents=False),
    "nothing cleaned": odd(lowercase=True, clean_text=False, handle_chinese_chars=False),
}


def cache_and_rust(backend, max_bytes=1 << 20):
    """A WordCache, what it remembers as it goes, and the plain way to the same."""
    backend = Tokenizer.from_str(backend.to_str())
    backend.encode_special_tokens = True

    def encode_by_rust(documents):
        return [array("i", backend.encode(text, add_special_tokens=False).ids).tobytes() for text in documents]

    facts = json.loads(backend.to_str())
    assert can_be_cached(facts)
    cache = WordCache(facts["model"], facts["normalizer"]["lowercase"], encode_by_rust, np.int32, max_bytes)
    return cache, encode_by_rust


CACHES = {name: cache_and_rust(backend) for name, backend in BACKENDS.items()}

spaces = st.sampled_from(
    " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2003\u2028\u2029\u202f\u205f\u3000\ufeff\u200b"
)
words = st.one_of(
    st.sampled_from(
        [piece.removeprefix("##") for piece in VOCABULARY] + SPECIAL_TOKENS + ["<mask>", "##s", "[ MASK ]"]
    ),
    st.text(st.sampled_from(LETTERS), max_size=12),
    st.text(st.characters(codec="utf-8"), max_size=5),
    st.text(st.characters(max_codepoint=127), max_size=5),
    st.text(st.characters(categories=["Mn", "Cf", "Cc", "Lo", "Po"]), max_size=4),
    st.builds(lambda letter, number: letter * number, st.sampled_from("aé数."), st.integers(5, 210)),
)
texts = st.lists(st.one_of(words, spaces, st.just(" ")), max_size=30).map("".join)


@pytest.mark.parametrize("name", BACKENDS)
@settings(deadline=None, max_examples=300)
@given(text=texts)
def test_any_text_gives_the_ids_of_rust(name, text):
    cache, encode_by_rust = CACHES[name]
    assert cache.encode([text]) == encode_by_rust([text])


@pytest.mark.parametrize("name", BACKENDS)
def test_single_characters_alone_inside_a_word_and_between_spaces(name):
    cache, encode_by_rust = cache_and_rust(BACKENDS[name], 1 << 30)
    characters = list(map(chr, [*range(0x3400), *range(0x3400, 0xD800, 29), *range(0xE000, 0x30000, 29)]))
    lines = [" ".join(f"{c} the{c}cat {c}s" for c in characters[at : at + 64]) for at in range(0, len(characters), 64)]
    assert cache.encode(lines) == encode_by_rust(lines)


def test_real_text_and_the_sample(data_folder):
    lines = (data_folder / "wikitext-2/valid.txt").read_text().split("\n")[:2000]
    for cache, encode_by_rust in (cache_and_rust(BACKENDS[name]) for name in ("uncased", "cased", "nothing cleaned")):
        for documents in (lines, TEXTS, SAMPLE):
            assert cache.encode(documents) == encode_by_rust(documents)


def test_a_full_cache_starts_anew_with_the_same_ids():
    (small, encode_by_rust), (large, _) = cache_and_rust(BACKENDS["trained"], 20_000), CACHES["trained"]
    sizes = set()
    for text in TEXTS:
        assert small.encode([text]) == large.encode([text])
        sizes.add(len(small))
    assert max(sizes) <= 100 < len(large)
    long = ["x" * 30_000 + "é", "y" * 30_000]  # each larger than the whole cache
    assert small.encode(long * 2) == encode_by_rust(long * 2)


def test_rust_is_asked_for_each_unusual_chunk_once():
    _, encode_by_rust = CACHES["trained"]
    asked = []

    def encode(documents):
        asked.extend(documents)
        return encode_by_rust(documents)

    model = json.loads(BACKENDS["trained"].to_str())["model"]
    cache = WordCache(model, True, encode, np.int32)
    cache.encode(["a naïve state, a naïve\nvalue", "Naïve? naïve"])
    assert asked == ["naïve", "Naïve?"]


def test_a_cache_that_differs_is_given_up_and_one_line_says_so():
    lines = []
    cache, encode_by_rust = CACHES["cased"]
    wrong = WordCache(
        json.loads(BACKENDS["cased"].to_str())["model"], True, encode_by_rust, np.int32
    )  # not lower case
    encode = CheckedEncoder(wrong.encode, encode_by_rust, lines.append)
    assert len(lines) == 1 and "word cache" in lines[0] and "\n" not in lines[0]
    assert encode(["The CAT"] * 3) == encode_by_rust(["The CAT"] * 3)
    encode = CheckedEncoder(cache.encode, encode_by_rust, lines.append)
    assert encode(TEXTS) == encode_by_rust(TEXTS)
    assert len(lines) == 1


def test_a_difference_in_the_first_documents_is_found():
    lines = []
    cache, encode_by_rust = cache_and_rust(BACKENDS["cased"])
    cache["strange"] = b""  # of what the sample does not hold
    encode = CheckedEncoder(cache.encode, encode_by_rust, lines.append)
    assert not lines
    documents = ["the cat", "strange", "The strange cat"]
    assert encode(documents) == encode(documents) == encode_by_rust(documents)
    assert len(lines) == 1 and "'strange'" in lines[0]


def test_only_tokenizers_that_work_word_by_word_are_cached():
    assert all(can_be_cached(json.loads(backend.to_str())) for backend in BACKENDS.values())
    bare = odd()
    bare.normalizer = None
    other = odd()
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    added = odd()
    added.add_tokens([AddedToken("the cat")])
    unknown = Tokenizer(models.WordPiece({"a": 0}, unk_token="[UNK]"))
    unknown.normalizer, unknown.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    for backend in (bare, other, added, unknown, Tokenizer(models.BPE())):
        assert not can_be_cached(json.loads(backend.to_str()))
    special = odd()
    special.add_special_tokens([AddedToken("the cat")])
    (ids,) = corpus_encoder(added.to_str(), np.int32, print)(["a the cat b"])
    assert len(ids) == 3 * 4
    (ids,) = corpus_encoder(special.to_str(), np.int32, print)(["a the cat b"])
    assert len(ids) == 4 * 4


@pytest.mark.parametrize("workers", [1, 2])
def test_tokenizing_a_corpus_gives_the_ids_of_rust(workers):
    backend = BACKENDS["trained"]
    documents = ["", *SAMPLE, *TEXTS * 3]
    batches = [documents[at : at + 50] for at in range(0, len(documents), 50)]
    lines = []
    parts = list(tokenize(batches, backend.to_str(), np.uint16, workers, lines.append))
    _, encode_by_rust = CACHES["trained"]
    expected = [np.frombuffer(ids, np.int32) for ids in encode_by_rust(documents) if ids]
    assert np.concatenate([tokens for tokens, _ in parts]).tolist() == np.concatenate(expected).tolist()
    assert np.concatenate([lengths for _, lengths in parts]).tolist() == [len(ids) for ids in expected]
    assert not lines and all(tokens.dtype == np.uint16 and lengths.dtype == np.int32 for tokens, lengths in parts)
