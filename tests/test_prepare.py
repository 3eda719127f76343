"""Preparing a corpus: every source, the split, the cache, and what happens when it is killed, shared or damaged."""

import gzip
import json
import os
import subprocess
import sys
import time
from pydoc_data.topics import topics
from types import SimpleNamespace

import numpy as np
import pytest

from common.data.prepare import PreparedCorpus, prepare_corpus
from common.data.sources import split
from common.data.tokenizing import tokenize
from common.data.wordpiece import SPECIAL_TOKENS, train_wordpiece, wordpiece_tokenizer
from common.errors import UserError

PARAGRAPHS = [" ".join(text.split()) for name in sorted(topics) for text in topics[name].split("\n\n")]
DOCUMENTS = list(dict.fromkeys(text for text in PARAGRAPHS if text))[:500]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_wordpiece(DOCUMENTS, 800).save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(tmp_path, tokenizer_folder):
    """Makes data arguments; by default DOCUMENTS in a text file, with a ready tokenizer."""
    (tmp_path / "train.txt").write_text("\n".join(DOCUMENTS))
    defaults = {
        "dataset_name": None,
        "dataset_config_name": None,
        "streaming": False,
        "train_file": str(tmp_path / "train.txt"),
        "validation_file": None,
        "dataset_path": None,
        "text_column": "text",
        "document_separator": "line",
        "validation_split_percentage": 5,
        "max_bad_records": 0,
        "tokenizer_name": str(tokenizer_folder),
        "tokenizer_train_vocab_size": 600,
        "cache_dir": str(tmp_path / "cache"),
        "overwrite_cache": False,
        "preprocessing_num_workers": 1,
        "trust_remote_code": False,
        "max_train_documents": None,
    }
    return lambda **changes: SimpleNamespace(**{**defaults, **changes})


def prepare(data_args) -> tuple[PreparedCorpus, str]:
    lines = []
    corpus = prepare_corpus(data_args, lines.append)
    return corpus, "\n".join(lines)


def texts(corpus, part):
    token_file = getattr(corpus, part)
    ends = token_file.starts + token_file.lengths
    return [corpus.tokenizer.decode(token_file.tokens[a:b]) for a, b in zip(token_file.starts, ends, strict=True)]


def through(corpus, documents):
    """What is left of documents after encoding and decoding."""
    encode = corpus.tokenizer
    return [encode.decode(encode(document, add_special_tokens=False).input_ids) for document in documents]


def error_of(data_args):
    with pytest.raises(UserError) as caught:
        prepare(data_args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_document_is_in_one_part_in_order(arguments):
    corpus, said = prepare(arguments())
    held_out = [held for held, _ in split(DOCUMENTS, 5)]
    for part, wanted in (("train", False), ("validation", True)):
        documents = [text for text, held in zip(DOCUMENTS, held_out, strict=True) if held == wanted]
        assert texts(corpus, part) == through(corpus, documents)
    assert 10 <= corpus.validation.num_documents <= 45  # 5 % of 500
    assert corpus.train.tokens.dtype == np.uint16
    assert corpus.train.metadata["special_ids"]["mask"] == corpus.tokenizer.mask_token_id
    assert not {0, 2, 3, 4} & set(np.unique(corpus.train.tokens).tolist())
    assert "preparing" in said and "MB of text" in said


def test_second_time_reuses_and_says_so(arguments):
    first, _ = prepare(arguments(tokenizer_name=None))
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    second, said = prepare(arguments(tokenizer_name=None, preprocessing_num_workers=2))
    assert "reusing" in said and "\n" not in said
    assert {path: path.stat().st_mtime_ns for path in second.folder.rglob("*")} == before
    assert second.fingerprint == first.fingerprint
    assert len(first.tokenizer) == 600


def test_what_changes_the_data_makes_another_corpus(arguments, tmp_path):
    base, _ = prepare(arguments())
    changes = [
        {"validation_split_percentage": 10},
        {"document_separator": "file", "validation_file": str(tmp_path / "other.txt")},
        {"max_train_documents": 50},
        {"tokenizer_name": None},
    ]
    (tmp_path / "other.txt").write_text("something else")
    corpora = [prepare(arguments(**change))[0] for change in changes]
    assert len({corpus.fingerprint for corpus in [base, *corpora]}) == 5
    assert len({corpus.folder for corpus in [base, *corpora]}) == 5
    with open(tmp_path / "train.txt", "a") as file:
        file.write("\none more document, which was not there before")
    changed, said = prepare(arguments())
    assert "preparing" in said and changed.fingerprint != base.fingerprint


def test_number_of_workers_does_not_change_a_byte(arguments, tmp_path):
    many = [f"{number} {document}" for number in range(15) for document in DOCUMENTS]
    (tmp_path / "train.txt").write_text("\n".join(many))
    folders = []
    for workers in (1, 3):
        cache = str(tmp_path / f"cache{workers}")
        corpus, _ = prepare(arguments(cache_dir=cache, preprocessing_num_workers=workers))
        folders.append(corpus.folder)
    assert corpus.train.num_documents + corpus.validation.num_documents == len(many)
    for name in ("train.bin", "train.idx", "validation.bin", "validation.idx"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1


def test_own_validation_file(arguments, tmp_path):
    (tmp_path / "valid.txt.gz").write_bytes(gzip.compress(b"kept aside\n\nand this"))
    corpus, _ = prepare(arguments(validation_file=str(tmp_path / "valid.txt.gz")))
    assert texts(corpus, "validation") == ["kept aside", "and this"]
    assert corpus.train.num_documents == len(DOCUMENTS)
    assert "keep them apart" in error_of(arguments(validation_file=str(tmp_path / "*.txt")))


def test_split_keeps_equal_documents_together_and_leaves_none_empty():
    documents = [f"document {number % 300}" for number in range(3000)]
    parts = {held: {text for is_held, text in split(documents, 20) if is_held == held} for held in (True, False)}
    assert not parts[True] & parts[False]
    assert 40 <= len(parts[True]) <= 80  # 20 % of 300 distinct ones
    for percentage in (0.001, 99.9):
        assert sorted(held for held, _ in split(["one", "two"], percentage)) == [False, True]
    order = dict((text, held) for held, text in split(reversed(documents), 20))
    assert all(order[text] for text in parts[True])


def test_local_dataset_folder_as_from_the_hub(arguments, tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    for name, part in (("train", DOCUMENTS[:30]), ("validation", DOCUMENTS[30:35])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in part))
    flags = {"train_file": None, "dataset_name": str(folder), "text_column": "body"}
    corpora = [
        prepare(arguments(**flags, streaming=streaming, overwrite_cache=True))[0] for streaming in (False, True)
    ]
    for corpus in corpora:
        assert texts(corpus, "train") == through(corpus, DOCUMENTS[:30])
        assert texts(corpus, "validation") == through(corpus, DOCUMENTS[30:35])
    assert "there are: body" in error_of(arguments(**flags | {"text_column": "text"}))


def test_embedded_corpus_is_the_default(arguments):
    corpus, _ = prepare(arguments(train_file=None, max_train_documents=200))
    assert corpus.train.num_documents + corpus.validation.num_documents == 200
    assert corpus.folder.name.startswith("embedded-")


def test_prepared_folder_and_prefix(arguments, tmp_path):
    made, _ = prepare(arguments())
    flags = {"train_file": None, "tokenizer_name": None, "cache_dir": str(tmp_path / "elsewhere")}
    folder, _ = prepare(arguments(**flags, dataset_path=str(made.folder)))
    assert folder.fingerprint == made.fingerprint
    assert texts(folder, "validation") == texts(made, "validation")
    for path in ("train", "train.bin"):
        prefix, _ = prepare(arguments(**flags, dataset_path=str(made.folder / path)))
        starts = np.concatenate([prefix.train.starts, prefix.validation.starts])
        assert sorted(starts) == made.train.starts.tolist()
        assert 5 <= prefix.validation.num_documents <= 45
    first, _ = prepare(arguments(**flags, dataset_path=str(made.folder), max_train_documents=7))
    assert texts(first, "train") == texts(made, "train")[:7]


def test_token_files_need_their_own_tokenizer(arguments, tmp_path):
    made, _ = prepare(arguments())
    flags = {"train_file": None, "dataset_path": str(made.folder)}
    description = (made.folder / "train.json").read_text()
    (made.folder / "train.json").write_text(description.replace('"tokenizer_fingerprint"', '"fingerprint"'))
    assert "train.json: tokenizer_fingerprint is missing" in error_of(arguments(**flags))
    (made.folder / "train.json").write_text(description)
    wordpiece_tokenizer(SPECIAL_TOKENS + ["word"], lowercase=True).save_pretrained(tmp_path / "small")
    assert "another tokenizer" in error_of(arguments(**flags, tokenizer_name=str(tmp_path / "small")))
    for part in ("train", "validation"):
        (made.folder / f"{part}.json").unlink()  # as from Megatron's tools
    assert "only 6" in error_of(arguments(**flags, tokenizer_name=str(tmp_path / "small")))
    corpus, _ = prepare(arguments(**flags))
    assert texts(corpus, "train") == texts(made, "train")
    (made.folder / "tokenizer").rename(tmp_path / "moved")
    assert "--tokenizer_name" in error_of(arguments(**flags, tokenizer_name=None))


def test_genuine_megatron_files_are_used_as_they_are(arguments, data_folder):
    prefix = data_folder / "megatron" / "meg-gpt2-openwebtext_text_document"
    vocabulary = str(data_folder / "vocab" / "bert-base-uncased")
    corpus, _ = prepare(arguments(train_file=None, dataset_path=str(prefix), tokenizer_name=vocabulary))
    assert corpus.train.num_documents + corpus.validation.num_documents == 1000
    assert 20 <= corpus.validation.num_documents <= 90
    assert corpus.train.lengths.sum() + corpus.validation.lengths.sum() == len(corpus.train.tokens)


def test_damaged_cache_is_refused_then_made_anew(arguments):
    made, _ = prepare(arguments())
    good = (made.folder / "train.bin").read_bytes()
    (made.folder / "train.bin").write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    message = error_of(arguments())
    assert "train.bin: damaged" in message and "--overwrite_cache" in message
    error_of(arguments())  # and stays refused
    prepare(arguments(overwrite_cache=True))
    assert (made.folder / "train.bin").read_bytes() == good
    assert "reusing" in prepare(arguments())[1]


@pytest.mark.parametrize(
    ("content", "changes", "said"),
    [
        ("a single document", {}, "only one document"),
        (" \n\n ", {}, "no documents"),
        (" \n\n ", {"tokenizer_name": None}, "no documents"),
        ("one\ntwo", {"train_file": "no-such-file"}, "no-such-file"),
        ("one\ntwo", {"train_file": None, "dataset_path": "no-such-prefix"}, "no-such-prefix.bin"),
        ("one\n\xff\ntwo", {}, "train.txt:2: not valid UTF-8"),
        ("one\ntwo", {"cache_dir": "/dev/null/cache"}, "--cache_dir"),
    ],
)
def test_bad_input_leaves_nothing_behind(arguments, tmp_path, content, changes, said):
    (tmp_path / "train.txt").write_bytes(content.encode("latin-1"))
    assert said in error_of(arguments(**changes))
    assert not [path for path in tmp_path.glob("cache/*") if path.is_dir()]


def test_skipped_bad_records_are_reported(arguments, tmp_path):
    (tmp_path / "train.txt").write_bytes(b"one\n\xff\ntwo\n\xff\n" + "\n".join(DOCUMENTS).encode())
    corpus, said = prepare(arguments(max_bad_records=2, tokenizer_name=None))
    assert "2 bad records skipped" in said
    assert corpus.train.num_documents + corpus.validation.num_documents == len(DOCUMENTS) + 2


PREPARE = """
import json, sys
from types import SimpleNamespace
from common.data.prepare import prepare_corpus
data_args = SimpleNamespace(**json.loads(sys.argv[1]))
print(prepare_corpus(data_args, lambda line: print(line, flush=True)).fingerprint)
"""


@pytest.fixture
def other_process(arguments, tmp_path):
    """Another process that is in the middle of preparing 10 000 documents, and these documents."""
    documents = [f"{number} {document}" for number in range(20) for document in DOCUMENTS]
    (tmp_path / "train.txt").write_text("\n".join(documents))
    command = [sys.executable, "-c", PREPARE, json.dumps(vars(arguments()))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("cache/.*.tmp/train.bin.tmp")):
        assert process.poll() is None
        time.sleep(0.01)
    yield process, documents
    process.kill()
    process.wait()
    process.stdout.close()


def test_killed_preparation_leaves_nothing_that_is_taken_for_complete(arguments, tmp_path, other_process):
    process, documents = other_process
    process.kill()
    process.wait()
    assert not list(tmp_path.glob("cache/train-*"))
    corpus, said = prepare(arguments())
    assert "preparing" in said
    assert corpus.train.num_documents + corpus.validation.num_documents == len(documents)
    assert not list(tmp_path.glob("cache/.*.tmp"))


def test_second_process_waits_for_the_first(arguments, other_process):
    process, _ = other_process
    corpus, said = prepare(arguments())
    assert "waiting" in said and "reusing" in said and "preparing" not in said
    assert process.stdout.read().splitlines()[-1] == corpus.fingerprint


def test_dead_worker_ends_in_one_line(tokenizer_folder):
    batches = [["text " * 300_000], ["text " * 300_000]]
    with pytest.raises(UserError, match="--preprocessing_num_workers"):
        list(tokenize(batches, '{"not": "a tokenizer"}', np.uint16, 2, print))


def test_importing_does_not_load_the_heavy_libraries():
    heavy = "torch transformers datasets pyarrow zstandard tokenizers"
    code = f"import sys, common.data.prepare; print(*[name for name in '{heavy}'.split() if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == ""
