"""Tokenizers: every way to give one loads the same ids, and a trained one is the same each time."""

import shutil
import subprocess
import sys
from pydoc_data.topics import topics

import numpy as np
import pytest
from transformers import AutoTokenizer, BertTokenizer

from common.data.tokenizers import corpus_encoder, load_tokenizer, tokenizer_fingerprint, vocabulary_size
from common.data.wordpiece import SPECIAL_TOKENS, train_wordpiece, wordpiece_tokenizer
from common.errors import UserError

WORDS = ["the", "cat", "sat", "##s", "mat", ",", "on", "naive"]
SENTENCE = "The cats sat on the naïve mat, 数"


def vocab_file(folder, tokens):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return folder / "vocab.txt"


def error_of(name):
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bare_vocabulary(tmp_path):
    tokens = SPECIAL_TOKENS + WORDS
    from_file = load_tokenizer(str(vocab_file(tmp_path / "uncased", tokens)))
    assert type(from_file) is BertTokenizer
    assert from_file.convert_ids_to_tokens(range(len(from_file))) == tokens
    expected = "the cat ##s sat on the naive mat , [UNK]".split()
    assert from_file.tokenize(SENTENCE) == expected
    assert load_tokenizer(str(tmp_path / "uncased")).tokenize(SENTENCE) == expected
    cased = load_tokenizer(str(vocab_file(tmp_path / "cased", tokens + ["The", "naïve"])))
    assert cased.tokenize(SENTENCE) == "The cat ##s sat on the naïve mat , [UNK]".split()


@pytest.mark.parametrize("name", ["bert-base-uncased", "bert-base-cased"])
def test_saved_published_vocabulary_loads_with_equal_ids(data_folder, tmp_path, name):
    ours = load_tokenizer(str(data_folder / "vocab" / name))
    assert len(ours) == {"bert-base-uncased": 30522, "bert-base-cased": 28996}[name]
    assert ours.model_max_length > 1e6  # a file of words says nothing of a length
    ours.save_pretrained(tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert type(stock) is BertTokenizer
    text = " ".join(topics.values())
    assert stock(text).input_ids == ours(text).input_ids
    if name == "bert-base-uncased":  # ids known from its paper's repository
        assert ours("Hello, world!").input_ids == [101, 7592, 1010, 2088, 999, 102]


def test_all_forms_of_one_tokenizer_have_one_fingerprint(tmp_path):
    tokenizer = wordpiece_tokenizer(SPECIAL_TOKENS + WORDS, lowercase=True)
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "saved" / "tokenizer.json", tmp_path / "bare" / "tokenizer.json")
    shutil.copy(tmp_path / "saved" / "tokenizer.json", tmp_path / "mine.json")
    forms = ["saved", "saved/tokenizer.json", "bare", "bare/tokenizer.json", "mine.json"]
    loaded = [load_tokenizer(str(tmp_path / form)) for form in forms]
    assert {tokenizer_fingerprint(other) for other in loaded} == {tokenizer_fingerprint(tokenizer)}
    assert {other.mask_token_id for other in loaded} == {4}
    tokenizer(["the cat", "the"], padding="max_length", truncation=True, max_length=4)
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(loaded[0])
    assert tokenizer_fingerprint(
        wordpiece_tokenizer(SPECIAL_TOKENS + WORDS, lowercase=False)
    ) != tokenizer_fingerprint(tokenizer)


def test_tokenizers_that_cannot_be_used(tmp_path):
    assert "[MASK]" in error_of(vocab_file(tmp_path / "a", SPECIAL_TOKENS[:4] + WORDS))
    assert "'cat' stands on more than one line" in error_of(
        vocab_file(tmp_path / "b", SPECIAL_TOKENS + WORDS + ["cat"])
    )
    (tmp_path / "c.json").write_text('{"a": 1}')
    assert "c.json: not a tokenizer.json" in error_of(tmp_path / "c.json")
    tokenizer = wordpiece_tokenizer(SPECIAL_TOKENS + WORDS, lowercase=True)
    tokenizer.backend_tokenizer.save(str(tmp_path / "d.json"))
    text = (tmp_path / "d.json").read_text().replace("[MASK]", "[HOLE]").replace("[SEP]", "[END]")
    (tmp_path / "d.json").write_text(text)
    assert "has no sep_token, mask_token" in error_of(tmp_path / "d.json")
    (tmp_path / "empty").mkdir()
    assert "cannot be loaded" in error_of(tmp_path / "empty")
    assert "--tokenizer_name no-such/tokenizer" in (message := error_of("no-such/tokenizer"))
    assert "vocab.txt" in message


TRAIN = """
from pydoc_data.topics import topics
from common.data.tokenizers import tokenizer_fingerprint
from common.data.wordpiece import train_wordpiece
print(tokenizer_fingerprint(train_wordpiece([topics[name] for name in sorted(topics)], 1500)))
"""


def test_training_gives_the_same_tokenizer_in_every_process():
    trained = train_wordpiece([topics[name] for name in sorted(topics)], 1500)
    assert trained.convert_ids_to_tokens(range(5)) == SPECIAL_TOKENS
    assert len(trained) == vocabulary_size(trained) == 1500
    assert trained.model_max_length > 1e6
    assert trained.unk_token_id not in trained("The statement returns its value.").input_ids
    for _ in range(2):
        other = subprocess.run([sys.executable, "-c", TRAIN], capture_output=True, text=True, check=True)
        assert other.stdout.strip() == tokenizer_fingerprint(trained)


def test_vocabulary_size_is_an_upper_limit():
    exotic = [chr(code) for code in range(0x3B1, 0x3C9)] + [chr(code) for code in range(0x4E00, 0x4F00)]
    assert len(train_wordpiece([" ".join(exotic)], 120)) <= 120
    assert len(train_wordpiece(["just a few words"], 5000)) < 100
    with pytest.raises(UserError, match="--tokenizer_train_vocab_size 20"):
        train_wordpiece(["text"], 20)


def test_a_vocabulary_with_gaps_needs_its_largest_id(tmp_path):
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS)} | {"cat": 5, "mat": 900}
    BertTokenizer(vocab=vocab).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer("cat mat", add_special_tokens=False).input_ids == [5, 900]
    assert vocabulary_size(tokenizer) == 901 and len(tokenizer) == 7


def test_text_never_becomes_a_special_token():
    tokenizer = train_wordpiece([topics["lists"], "[ ] sep mask cls"] * 3, 300)
    text = "a [SEP] b [MASK] c [CLS]"
    assert tokenizer.sep_token_id in tokenizer(text, add_special_tokens=False).input_ids  # what is to be avoided
    tokenizer.backend_tokenizer.enable_truncation(4)
    (ids,) = corpus_encoder(tokenizer.backend_tokenizer.to_str(), np.uint16, print)([text])
    ids = np.frombuffer(ids, np.uint16)
    assert not set(ids.tolist()) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids).replace(" ", "") == text.lower().replace(" ", "")
