"""The cache in front of byte-level BPE gives the Rust tokenizer's ids, for any text, or is not used."""

import json
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_word_cache import TEXTS, texts
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from common.data.bpe import train_byte_level_bpe
from common.data.byte_level_cache import ByteLevelCache, is_plain_byte_level
from common.data.tokenizers import corpus_encoder, load_tokenizer
from common.data.word_cache import SAMPLE
from common.prepare.inputs import ANY

BACKEND = train_byte_level_bpe(TEXTS, 1200).backend_tokenizer
SPACES = " \t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u180e\u2003\u2028\u202f\u3000\ufeff\u200b"
runs = st.lists(
    st.one_of(st.text(st.sampled_from(SPACES), max_size=4), st.sampled_from("a é 1 ' 's 'll ! 数 _".split()))
)


def cache_and_rust(backend, **options):
    """A ByteLevelCache, what it remembers as it goes, and the plain way to the same."""
    backend = Tokenizer.from_str(backend.to_str())
    backend.encode_special_tokens = True

    def encode_by_rust(documents):
        return [array("i", backend.encode(text, add_special_tokens=False).ids).tobytes() for text in documents]

    assert is_plain_byte_level(json.loads(backend.to_str()))
    return ByteLevelCache(encode_by_rust, **options), encode_by_rust


CACHE, ENCODE_BY_RUST = cache_and_rust(BACKEND)


@settings(deadline=None, max_examples=1000)
@given(text=st.one_of(texts, runs.map("".join)))
def test_any_text_gives_the_ids_of_rust(text):
    assert CACHE.encode([text]) == ENCODE_BY_RUST([text])


def test_single_characters_between_spaces_of_every_kind():
    characters = list(map(chr, [*range(0x3400), *range(0x3400, 0xD800, 29), *range(0xE000, 0x30000, 29)]))
    lines = [
        " ".join(f"{c} \nthe{c}cat\n\n {c}  \n" for c in characters[at : at + 8])
        for at in range(0, len(characters), 8)
    ]
    assert CACHE.encode(lines) == ENCODE_BY_RUST(lines)


def test_real_text_with_the_vocabulary_of_opt(data_folder):
    backend = load_tokenizer(str(data_folder / "vocab" / "opt"), kind=ANY).backend_tokenizer
    cache, encode_by_rust = cache_and_rust(backend)
    lines = (data_folder / "wikitext-2/valid.txt").read_text()
    for documents in ([lines], lines.split("\n")[:2000], TEXTS, SAMPLE):
        assert cache.encode(documents) == encode_by_rust(documents)


def test_a_full_cache_starts_anew_with_the_same_ids():
    small, _ = cache_and_rust(BACKEND, max_bytes=20_000)
    sizes = set()
    for text in TEXTS:
        assert small.encode([text]) == CACHE.encode([text])
        sizes.add(len(small))
    assert max(sizes) <= 100


@pytest.mark.parametrize("characters", [1, 10, 300])
def test_a_long_document_in_parts(monkeypatch, characters):
    monkeypatch.setattr("common.data.byte_level_cache.PART_CHARACTERS", characters)
    for text in (*TEXTS[:5], "x" * 50, "a\n\n b  c \n", " \n"):
        assert CACHE.encode([text]) == ENCODE_BY_RUST([text])


def test_rust_is_asked_for_each_chunk_once():
    asked = []

    def encode(documents):
        asked.extend(documents)
        return ENCODE_BY_RUST(documents)

    cache = ByteLevelCache(encode)
    cache.encode(["the cat, the cat\n the", " the cat"])
    assert sorted(asked) == sorted(["the", " cat,", " the", " cat", "\n the"])


def test_only_tokenizers_that_work_chunk_by_chunk_are_cached():
    def changed(change):
        backend = Tokenizer.from_str(BACKEND.to_str())
        change(backend)
        return json.loads(backend.to_str())

    def prefixed(backend):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)

    def whole(backend):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def added(backend):
        backend.add_tokens([AddedToken("the cat")])

    def dropping(backend):
        backend.model.dropout = 0.1

    for change in (prefixed, whole, added, dropping):
        assert not is_plain_byte_level(changed(change))
    assert is_plain_byte_level(changed(lambda backend: None))
    lines = []
    (ids,) = corpus_encoder(BACKEND.to_str(), np.int32, lines.append)([TEXTS[0]])
    assert ids == ENCODE_BY_RUST([TEXTS[0]])[0] and not lines
