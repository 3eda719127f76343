"""Byte-level BPE: GPT-2's and OPT's bare files, one trained on the data, and corpora prepared with them."""

import json
import shutil
import sys
from dataclasses import replace
from pydoc_data.topics import topics

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer

from common.arguments import DataArguments
from common.data.bpe import ROUND_TRIP, SPECIAL_TOKENS, byte_level_tokenizer, train_byte_level_bpe
from common.data.prepare import prepare_corpus
from common.data.tokenizers import CAUSAL, corpus_encoder, load_tokenizer, tokenizer_fingerprint, vocabulary_size
from common.data.wordpiece import train_wordpiece
from common.errors import UserError
from harness import REPOSITORY

TEXTS = [topics[name] for name in sorted(topics)]
TEXT = "Hello world,\n  it's a naïve café — 数学 🙂 in 2024!"


@pytest.fixture
def opt(data_folder):
    return load_tokenizer(str(data_folder / "vocab" / "opt"), kind=CAUSAL)


@pytest.fixture
def bare(tmp_path):
    """Makes a folder with a small vocab.json and merges.txt, after a change of either."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["h e", "Ġ t", "Ġt he"]
    vocab = {token: n for n, token in enumerate([*SPECIAL_TOKENS, *alphabet, *(m.replace(" ", "") for m in merges)])}

    def write(change=lambda vocab, merges: None):
        words, pairs = dict(vocab), list(merges)
        change(words, pairs)
        (tmp_path / "bare").mkdir(exist_ok=True)
        (tmp_path / "bare" / "vocab.json").write_text(json.dumps(words))
        (tmp_path / "bare" / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]))
        return tmp_path / "bare"

    return write


def plain_bpe(vocab_file, merges_file):
    """The tokenizers library's own reading of the two files."""
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab_file), str(merges_file)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def error_of(name, kind=CAUSAL):
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(name), kind=kind)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- bare files ----------------------------------------------------------------------------------


def test_opts_bare_files(opt, data_folder):
    assert opt("Hello world").input_ids == [2, 31414, 232]  # known from OPT's documentation
    assert (opt.bos_token_id, opt.eos_token_id, opt.unk_token_id, opt.pad_token_id) == (2, 2, 2, 1)
    assert opt.decode([2, 31414, 232], skip_special_tokens=True) == "Hello world"
    assert len(opt) == vocabulary_size(opt) == 50265 and opt.model_max_length > 1e6
    folder = data_folder / "vocab" / "opt"
    plain = plain_bpe(folder / "vocab.json", folder / "merges.txt")
    for text in [TEXT, ROUND_TRIP, *TEXTS[:20]]:
        assert ids(opt, text) == plain.encode(text).ids and opt(text).input_ids == [2, *ids(opt, text)]
        assert opt.decode(ids(opt, text)) == text


def test_gpt2s_bare_files_with_a_prefix(data_folder, tmp_path):
    for name in ("gpt2-tiny-vocab.json", "gpt2-tiny-merges.txt"):
        shutil.copy(data_folder / "megatron" / name, tmp_path)
    tiny = load_tokenizer(str(tmp_path), kind=CAUSAL)
    plain = plain_bpe(tmp_path / "gpt2-tiny-vocab.json", tmp_path / "gpt2-tiny-merges.txt")
    assert tiny(TEXT).input_ids == ids(tiny, TEXT) == plain.encode(TEXT).ids
    assert tiny.decode(ids(tiny, TEXT)) == TEXT
    assert tiny.eos_token_id == tiny.bos_token_id == 4999 and vocabulary_size(tiny) == len(tiny) == 5000


def test_opts_folder_on_the_hub_gives_the_same(opt, data_folder, tmp_path):
    """It has these two files and what its model card's configuration says of special tokens."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(data_folder / "vocab" / "opt" / name, tmp_path)
    end = {
        "content": "</s>",
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
        "__type": "AddedToken",
    }
    names = {name: end for name in ("bos_token", "eos_token", "unk_token")} | {
        "pad_token": {**end, "content": "<pad>"}
    }
    facts = {**names, "add_prefix_space": False, "add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(facts))
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    stock = load_tokenizer(str(tmp_path), kind=CAUSAL)
    for text in (TEXT, ROUND_TRIP, "a </s> b<pad>"):
        assert stock(text).input_ids == opt(text).input_ids
    assert stock.pad_token_id == 1 and stock.eos_token_id == 2


@pytest.mark.parametrize("model_type", ["opt", "gpt2", "llama"])
def test_saved_with_a_model_it_loads_with_equal_ids(bare, tmp_path, model_type):
    ours = load_tokenizer(str(bare()), kind=CAUSAL)
    ours.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": model_type}))
    for loaded in (
        AutoTokenizer.from_pretrained(tmp_path / "model"),
        load_tokenizer(str(tmp_path / "model"), kind=CAUSAL),
    ):
        assert type(loaded) is GPT2Tokenizer and loaded("the").input_ids == ours("the").input_ids
        for text in (TEXT, "the hen, </s> the", "<s><pad>"):
            assert loaded(text).input_ids == ours(text).input_ids
        assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(ours)


def test_a_bare_tokenizer_json_has_an_end_of_text(bare, tmp_path):
    ours = load_tokenizer(str(bare()), kind=CAUSAL)
    ours.backend_tokenizer.save(str(tmp_path / "mine.json"))
    loaded = load_tokenizer(str(tmp_path / "mine.json"), kind=CAUSAL)
    assert loaded.eos_token_id == 2 and loaded(TEXT).input_ids == ours(TEXT).input_ids


def test_bare_files_that_cannot_be_used(bare, tmp_path):
    assert "give a tokenizer.json" in error_of(bare(lambda vocab, merges: vocab.update({"<pad>": 2, "</s>": 1})))
    assert "'ï'" in error_of(bare(lambda vocab, merges: vocab.update(drop=vocab.pop("Ã"))))  # its first byte
    assert "not 0 to 262, each once" in error_of(bare(lambda vocab, merges: vocab.update({"Ġthe": 900})))
    assert "not 0 to 262, each once" in error_of(bare(lambda vocab, merges: vocab.update({"Ġthe": 5})))
    assert "merges 'Ġthe' and 'n'" in error_of(bare(lambda vocab, merges: merges.append("Ġthe n")))
    assert "cannot be read" in error_of(bare(lambda vocab, merges: merges.append("the")))
    many = {f"word{n}": 263 + n for n in range(500)}
    assert "no merge makes 504 of the 763 tokens" in error_of(bare(lambda vocab, merges: vocab.update(many)))
    folder = bare()
    (folder / "vocab.json").write_text('{"<s>": 0, "<pa')
    assert "cannot be read" in error_of(folder)
    (folder / "vocab.json").unlink()
    assert "holds merges.txt; give a folder with one vocab.json" in error_of(folder)
    for name in ("a-vocab.json", "b-vocab.json"):
        (folder / name).write_text("{}")
    assert "holds a-vocab.json, b-vocab.json, merges.txt" in error_of(folder)


def test_each_kind_says_what_it_wants(bare, tmp_path):
    with pytest.raises(UserError, match="has no cls_token, sep_token, mask_token; give a BERT-like tokenizer"):
        load_tokenizer(str(bare()))
    train_wordpiece(TEXTS[:5], 300).save_pretrained(tmp_path / "bert")
    assert "has no eos_token; give a tokenizer with an end-of-text token" in error_of(tmp_path / "bert")


# ---- trained on the data -------------------------------------------------------------------------

TRAIN = """
from pydoc_data.topics import topics
from common.data.bpe import train_byte_level_bpe
from common.data.tokenizers import tokenizer_fingerprint
print(tokenizer_fingerprint(train_byte_level_bpe([topics[name] for name in sorted(topics)], 1500)))
"""


@pytest.fixture(scope="module")
def trained():
    return train_byte_level_bpe(TEXTS, 1500)


def test_training_gives_the_same_tokenizer_in_every_process(harness, trained):
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed}
        other = harness.command(sys.executable, "-c", TRAIN, env=env, cwd=REPOSITORY).check()
        assert other.stdout.strip() == tokenizer_fingerprint(trained)


def test_a_trained_tokenizer_is_like_opts(trained, tmp_path):
    assert trained.convert_ids_to_tokens(range(4)) == SPECIAL_TOKENS and len(trained) == 1500
    assert (trained.bos_token_id, trained.eos_token_id, trained.pad_token_id) == (2, 2, 1)
    assert trained(TEXT).input_ids == [2, *ids(trained, TEXT)]
    assert trained.decode(ids(trained, ROUND_TRIP)) == ROUND_TRIP
    assert len(ids(trained, " the function returns")) <= 5  # words of these texts are tokens
    trained.save_pretrained(tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert type(stock) is GPT2Tokenizer and tokenizer_fingerprint(stock) == tokenizer_fingerprint(trained)
    for text in (TEXT, ROUND_TRIP, "one </s> two"):
        assert stock(text).input_ids == trained(text).input_ids


def test_vocabulary_size_is_an_upper_limit():
    assert len(train_byte_level_bpe(["just a few words"], 5000)) == 260  # no pair is there twice
    assert len(train_byte_level_bpe(["to be or not to be"] * 9, 262)) == 262
    with pytest.raises(UserError, match="--tokenizer_train_vocab_size 259"):
        train_byte_level_bpe(["text"], 259)


# ---- corpora -------------------------------------------------------------------------------------


def test_a_corpus_gets_the_tokenizers_ids_and_text_stays_text(trained):
    trained = byte_level_tokenizer(*_files_of(trained))  # truncation below is for this one
    documents = [*TEXTS[:30], TEXT, ROUND_TRIP, "a </s> b<pad>c <s>"]
    trained.backend_tokenizer.enable_truncation(4)
    encode = corpus_encoder(trained.backend_tokenizer.to_str(), np.uint16, pytest.fail)
    encoded = [np.frombuffer(found, np.uint16).tolist() for found in encode(documents)]
    trained.backend_tokenizer.no_truncation()
    for document, found in zip(documents[:-1], encoded[:-1], strict=True):
        assert found == ids(trained, document)
    assert 2 in ids(trained, documents[-1])  # what is to be avoided
    assert encoded[-1] == trained(documents[-1], add_special_tokens=False, split_special_tokens=True).input_ids
    assert not {0, 1, 2, 3} & set(encoded[-1]) and trained.decode(encoded[-1]) == documents[-1]


def _files_of(tokenizer):
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "train.txt").write_text("\n".join(" ".join(text.split()) for text in TEXTS))
    flags = {"train_file": str(tmp_path / "train.txt"), "cache_dir": str(tmp_path / "cache")}
    return DataArguments(**flags, tokenizer_train_vocab_size=600, preprocessing_num_workers=1)


def prepare(data_args, kind=CAUSAL):
    lines = []
    return prepare_corpus(data_args, lines.append, kind), "\n".join(lines)


def test_a_causal_corpus_is_prepared_once_and_apart_from_a_masked_one(arguments):
    corpus, said = prepare(arguments)
    assert "trained a byte-level BPE vocabulary of 600" in said
    again, said = prepare(arguments)
    assert "reusing" in said and again.fingerprint == corpus.fingerprint
    assert corpus.train.tokens.dtype == np.uint16
    assert corpus.train.metadata["special_ids"] == {"pad": 1, "unk": 2, "bos": 2, "eos": 2}
    assert not {0, 1, 2, 3} & set(np.unique(corpus.train.tokens).tolist())
    first = corpus.train.tokens[corpus.train.starts[0] :][: corpus.train.lengths[0]]
    assert corpus.tokenizer.decode(first) in [" ".join(text.split()) for text in TEXTS]
    masked = prepare_corpus(arguments, lambda _: None)
    assert masked.folder != corpus.folder and masked.tokenizer.mask_token_id == 4
    with pytest.raises(UserError, match="give a tokenizer with an end-of-text token"):
        prepare(replace(arguments, train_file=None, dataset_path=str(masked.folder)))


def test_a_corpus_with_opts_vocabulary(arguments, data_folder):
    corpus, _ = prepare(replace(arguments, tokenizer_name=str(data_folder / "vocab" / "opt")))
    assert corpus.train.tokens.dtype == np.uint16 and corpus.train.metadata["vocab_size"] == 50265
    folder, _ = prepare(replace(arguments, train_file=None, dataset_path=str(corpus.folder)))
    assert folder.fingerprint == corpus.fingerprint and folder.tokenizer("Hello world").input_ids == [2, 31414, 232]


def test_megatrons_own_files_with_their_vocabulary(arguments, data_folder):
    prefix = data_folder / "megatron" / "meg-gpt2-openwebtext_text_document"
    flags = {"train_file": None, "dataset_path": str(prefix), "tokenizer_name": str(prefix.parent)}
    corpus, _ = prepare(replace(arguments, **flags))
    at = corpus.train.starts[0]
    text = corpus.tokenizer.decode(corpus.train.tokens[at : at + corpus.train.lengths[0]])
    assert "the" in text.split() and "�" not in text
