"""prepare_pile_data.py: raw text to token files, in shards, whole or not at all."""

import bz2
import io
import json
import random
import sys
import time
from collections import Counter

import numpy as np
import pytest
import zstandard
from transformers import AutoTokenizer

import prepare_pile_data
from common.data.token_files import TokenFile, document_windows
from common.data.tokenizers import load_tokenizer
from common.errors import UserError
from common.prepare.inputs import ANY
from harness import REPOSITORY

WORDS = [f"word{number}" for number in range(300)]


def texts(number, seed=0):
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, 60))) + f" {place}" for place in range(number)]


def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def corpus(tmp_path):
    """Two files of distinct documents, with repetitions within a file and over both."""
    found = texts(900)
    write_lines(tmp_path / "a.txt", found[:500] + found[:20])
    write_lines(tmp_path / "b.txt", found[480:])
    return tmp_path


@pytest.fixture
def prepare(harness, corpus, tmp_path):
    def run(*words, out="out", code=0, text=None):
        flags = {"--input": text or [corpus / "a.txt", corpus / "b.txt"], "--output_dir": [tmp_path / str(out)]}
        flags |= {"--tokenizer_train_vocab_size": [400], "--workers": [1]}
        flags |= {"--validation_split_percentage": [10], "--test_split_percentage": [5]}
        more = [word for name, values in flags.items() if name not in words for word in (name, *values)]
        return harness.run("prepare_pile_data.py", *words, *more).check(code)

    return run


def documents(folder, name, tokenizer=None):
    """The documents of a split as text."""
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder / "tokenizer")
    file = TokenFile(folder / name)
    file.verify()
    return [
        tokenizer.decode(file.tokens[start : start + length])
        for start, length in zip(file.starts, file.lengths, strict=True)
    ]


def content(folder):
    """What every file that counts holds."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix in (".bin", ".idx") or path.name in ("train.json", "validation.json", "test.json")
    }


# ---- What comes out --------------------------------------------------------------------------------------


def test_every_document_once_in_one_split(prepare, tmp_path):
    said = prepare().stdout
    splits = {name: documents(tmp_path / "out", name) for name in ("train", "validation", "test")}
    found = [text for split in splits.values() for text in split]
    assert sorted(found) == sorted(texts(900))
    assert 0.05 < len(splits["validation"]) / 900 < 0.15 and 0.02 < len(splits["test"]) / 900 < 0.09
    assert "left out 40: occurred before" in said
    reasons = json.loads((tmp_path / "out" / "dropped.json").read_text())
    count, samples = reasons["occurred before"]
    assert (
        count == 40
        and len(samples) == 3
        and all(any(text.startswith(sample) for text in texts(900)) for sample in samples)
    )


def test_the_number_of_shards_changes_nothing_but_the_order(prepare, tmp_path):
    found = {}
    for shards in (1, 2, 4, 8):
        prepare("--num_shards", shards, out=shards)
        assert len(list((tmp_path / str(shards) / "shards").glob("*.bin"))) == shards
        splits = {name: sorted(documents(tmp_path / str(shards), name)) for name in ("train", "validation", "test")}
        found[shards] = splits
    assert found[1] == found[2] == found[4] == found[8]


def test_other_processes_write_the_same(prepare, harness, corpus, tmp_path):
    prepare()
    prepare("--workers", 2, out="two")
    assert content(tmp_path / "out") == content(tmp_path / "two")


def test_shards_by_themselves_and_then_together(prepare, tmp_path):
    prepare("--num_shards", 4)
    for words in (["0", "1"], ["--shard_index", 2]):
        prepare("tokenize", *words, "--num_shards", 4, out="parts")
    error = prepare("merge", "--num_shards", 4, out="parts", code=2).stderr
    assert "error: shards 3 are missing: tokenize 3," in error
    prepare("tokenize", "3,", "--num_shards", 4, out="parts")
    prepare("merge", "--num_shards", 4, out="parts")
    assert content(tmp_path / "out") == content(tmp_path / "parts")


def test_a_finished_one_does_nothing_and_another_setting_is_refused(prepare, tmp_path):
    prepare()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.bin")}
    assert "finished already" in prepare().stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.bin")} == before
    error = prepare("--append_eod", code=2).stderr
    assert "made with another append_eod (false, now true)" in error and "--overwrite_output_dir" in error
    prepare("--document_separator", "file", "--overwrite_output_dir")
    assert TokenFile(tmp_path / "out" / "train").num_documents == 2


def test_pretraining_reads_it(prepare, harness, tmp_path):
    prepare()
    flags = ["--dataset_path", tmp_path / "out", "--model_size", "tiny", "--max_train_steps", 3, "--fp32"]
    ran = harness.run(
        "run_pretraining.py", *flags, "--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache"
    )
    assert "documents" in ran.check().stdout


def test_megatrons_own_file_byte_for_byte(harness, data_folder, tmp_path):
    genuine = data_folder / "megatron"
    original = TokenFile(genuine / "meg-gpt2-openwebtext_text_document")
    assert original.num_documents == 1000
    folder = tmp_path / "vocabulary"
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((genuine / f"gpt2-tiny-{name}").read_bytes())
    tokenizer = load_tokenizer(str(folder), kind=ANY)
    with open(tmp_path / "text.jsonl", "w") as file:
        for start, length in zip(original.starts, original.lengths, strict=True):
            ids = original.tokens[start : start + length]
            assert ids[-1] == tokenizer.eos_token_id
            file.write(json.dumps({"text": tokenizer.decode(ids[:-1])}) + "\n")
    flags = ["--input", tmp_path / "text.jsonl", "--tokenizer_name", folder, "--append_eod", "--deduplicate", "false"]
    flags += ["--validation_split_percentage", 0, "--test_split_percentage", 0, "--output_dir", tmp_path / "out"]
    harness.run("prepare_pile_data.py", *flags, "--workers", 1).check()
    assert (tmp_path / "out" / "train.bin").read_bytes() == original.paths["bin"].read_bytes()
    assert not (tmp_path / "out" / "validation.bin").exists()


# ---- Interruptions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_killed_and_finished_with_the_same_bytes(harness, tmp_path, kills):
    for number in range(6):
        write_lines(tmp_path / f"{number}.txt", texts(3000, number))
    train = ["prepare_pile_data.py", "tokenize", "0,", "--input", tmp_path / "0.txt"]
    harness.run(*train, "--output_dir", tmp_path / "vocabulary").check()
    words = ["prepare_pile_data.py", "--input", *sorted(tmp_path.glob("*.txt")), "--workers", 2]
    words += ["--tokenizer_name", tmp_path / "vocabulary" / "tokenizer"]

    def start(out):
        return harness.start(*words, "--output_dir", tmp_path / out)

    began = time.monotonic()
    start("whole").wait().check()
    whole, chance = time.monotonic() - began, random.Random(kills)
    for _ in range(kills):
        process = start("killed")
        time.sleep(chance.uniform(0, whole))
        process.kill_group()
        process.wait()
    start("killed").wait().check()
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob("*.tmp"))


# ---- Parts by themselves --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["--near_duplicates"], ["--deduplicate_lines", "3"], ["--split_sentences"], ["--weights", "2", "1"]]
)
def test_memory_of_any_size_gives_the_same_bytes(monkeypatch, corpus, tmp_path, words):
    lines = [line for text in texts(40, seed=5) for line in (text, "the same line", "")]
    (tmp_path / "b.txt").write_text("\n\n".join(["\n".join(lines[at : at + 6]) for at in range(0, len(lines), 6)]))
    flags = [*words, "--tokenizer_train_vocab_size", "400", "--workers", "1", "--validation_split_percentage", "10"]
    flags += ["--document_separator", "blank_line"] if "--deduplicate_lines" in words else []
    inputs = ["--input", str(corpus / "a.txt"), str(tmp_path / "b.txt")]

    def prepared(name):
        assert prepare_pile_data.main([*inputs, "--output_dir", str(tmp_path / name), *flags]) == 0
        return {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.suffix in (".bin", ".idx", ".facts") or path.name == "dropped.json"
        }

    whole = prepared("whole")
    for name in ("common.prepare.facts.BLOCK", "common.prepare.repeated.COMPARED"):
        monkeypatch.setattr(name, 16)
    monkeypatch.setattr("common.data.token_files.WINDOW_SEQUENCES", 13)
    assert len(list(document_windows(tmp_path / "whole" / "train"))) > 2
    in_pieces = prepared("in_pieces")
    assert in_pieces.keys() == whole.keys() and all(in_pieces[path] == whole[path] for path in whole)


def near(text, chance):
    """The text with a word in a hundred changed, so that some nine in ten of its runs of five words are the same."""
    words = text.split()
    for at in range(7, len(words), 100):
        words[at] = f"other{chance.randint(0, 99)}"
    return " ".join(words)


def long_texts(number, chance):
    return [" ".join(f"w{chance.randint(0, 5000)}" for _ in range(200)) for _ in range(number)]


def test_near_duplicates(prepare, tmp_path):
    chance = random.Random(3)
    originals = long_texts(60, chance)
    copies = [near(text, chance) for text in originals[:20]]
    write_lines(tmp_path / "near.txt", originals + copies)
    kept = {}
    for shards in (1, 3):
        said = prepare("--num_shards", shards, "--near_duplicates", text=[tmp_path / "near.txt"], out=f"near{shards}")
        kept[shards] = sorted(
            text for name in ("train", "validation", "test") for text in documents(tmp_path / f"near{shards}", name)
        )
        assert "left out 20: nearly the same as another" in said.stdout
    assert kept[1] == kept[3]
    for original, copy in zip(originals, copies, strict=False):
        assert (original in kept[1]) + (copy in kept[1]) == 1
    assert set(originals[20:]) < set(kept[1])


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_repeated_lines(prepare, tmp_path, kind):
    chance = random.Random(4)
    found = [
        "\n".join(["Sign up for our letter", text, *(["", "All rights reserved"] if number % 2 else [])])
        for number, text in enumerate(texts(40))
    ]
    found += ["Sign up for our letter\nAll rights reserved", found[0]]
    chance.shuffle(found)
    with open(tmp_path / "lines.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in found)
    flags = (
        ["--deduplicate_lines", 5, "--tokenizer_type", kind, "--append_eod"]
        if kind == "bpe"
        else ["--deduplicate_lines", 5]
    )
    flags += ["--validation_split_percentage", 0, "--test_split_percentage", 0]
    kept = {}
    for shards in (1, 3):
        prepare("--num_shards", shards, *flags, text=[tmp_path / "lines.jsonl"], out=f"lines{shards}")
        kept[shards] = sorted(documents(tmp_path / f"lines{shards}", "train"))
    assert kept[1] == kept[3] and len(kept[1]) in (40, 41)
    squeezed = [" ".join(text.lower().split()) for text in kept[1]]
    for line in ("sign up for our letter", "all rights reserved"):
        assert sum(line in text for text in squeezed) == 5
    assert all(any(text in one for one in squeezed) for text in texts(40))
    if kind == "bpe":
        assert all(text.endswith("</s>") and text.count("</s>") == 1 for text in kept[1])
        assert any("\n" in text for text in kept[1])
    reasons = json.loads((tmp_path / "lines1" / "dropped.json").read_text())
    assert reasons["repeated lines"][0] == 41 + 21 - 10 and reasons["occurred before"][0] == 1
    assert reasons.get("of repeated lines alone", [0])[0] == 41 - len(kept[1])


def test_weights_are_shares_of_the_training_tokens(prepare, corpus, tmp_path):
    write_lines(tmp_path / "c.txt", texts(300, seed=9))
    inputs = [corpus / "a.txt", tmp_path / "c.txt"]
    for out, weights in (("three", (3, 1)), ("one", (1, 3)), ("none", (0, 1))):
        prepare("--weights", *weights, "--num_shards", 3, text=inputs, out=out)
        train = documents(tmp_path / out, "train")
        theirs = set(texts(300, seed=9))
        sizes = Counter()
        for text in train:
            sizes[text in theirs] += len(text)
        assert abs(sizes[False] / sizes.total() - weights[0] / sum(weights)) < 0.06
        counts = Counter(train)
        assert max(counts.values()) > 1 and len({count for text, count in counts.items() if text in theirs}) <= 2
        held_out = [text for name in ("validation", "test") for text in documents(tmp_path / out, name)]
        assert len(held_out) == len(set(held_out))
    assert "give one for each --input" in prepare("--weights", 1, code=2, out="bad").stderr


def test_decontaminated(prepare, tmp_path):
    chance = random.Random(5)
    judged, others = long_texts(5, chance), long_texts(30, chance)
    (tmp_path / "dev.tsv").write_text("".join(f"{n}\t{text}\t1\n" for n, text in enumerate(judged)))
    quoting = [
        f"{other} {' '.join(text.split()[50:63]).upper()}, {other}"
        for text, other in zip(judged, others, strict=False)
    ]
    near_enough = [f"{text} {' '.join(judged[0].split()[:12])}" for text in others[5:]]  # 12 words are not 13
    write_lines(tmp_path / "text.txt", quoting + near_enough)
    said = prepare("--decontaminate", tmp_path / "dev.tsv", text=[tmp_path / "text.txt"])
    assert "left out 5: 13 words in a row as in dev.tsv" in said.stdout
    kept = [
        text
        for name in ("train", "validation", "test")
        if (tmp_path / "out" / f"{name}.bin").exists()
        for text in documents(tmp_path / "out", name)
    ]
    assert sorted(kept) == sorted(near_enough)


def test_a_unigram_tokenizer(prepare, harness, corpus, tmp_path):
    for out in ("u1", "u2"):
        prepare("--tokenizer_type", "unigram", out=out)
    assert (tmp_path / "u1" / "train.bin").read_bytes() == (tmp_path / "u2" / "train.bin").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "u1" / "tokenizer")
    pair = tokenizer("word1 word2", "word3")
    assert tokenizer.convert_ids_to_tokens(pair.input_ids)[0] == "[CLS]" and pair.token_type_ids[-1] == 1
    assert pair.input_ids.count(tokenizer.sep_token_id) == 2
    found = [text for name in ("train", "validation", "test") for text in documents(tmp_path / "u1", name)]
    assert sorted(found) == sorted(texts(900))


def test_parts_of_the_pile(prepare, harness, data_folder, tmp_path):
    path, found = data_folder / "pile" / "sample.jsonl.zst", Counter()
    for record in map(json.loads, io.TextIOWrapper(zstandard.open(path), "utf-8")):
        found[record["meta"]["pile_set_name"]] += 1
    vocabulary = data_folder / "vocab" / "bert-base-uncased" / "vocab.txt"
    flags = ["--tokenizer_name", vocabulary, "--deduplicate", "false", "--num_shards", 3]
    prepare(*flags, text=[path])
    (least, number), *_ = found.most_common()[::-1]
    sources = [TokenFile(tmp_path / "out" / name).metadata["sources"] for name in ("train", "validation", "test")]
    assert sum((Counter({name: split[name][0] for name in split}) for split in sources), Counter()) == found
    said = harness.run("prepare_pile_data.py", "inspect", tmp_path / "out").check().stdout
    assert f" of the tokens: {least} (" in said
    flags += ["--workers", 2]
    prepare(*flags, "--components", least, "--test_split_percentage", 0, text=[path], out="part")
    parts = [TokenFile(path.with_suffix("")) for path in (tmp_path / "part").glob("*.bin")]
    assert sum(part.num_documents for part in parts) == number
    assert all(list(part.metadata["sources"]) == [least] for part in parts)


def test_sentences_are_sequences_of_their_document(prepare, harness, tmp_path):
    documents_of = [
        ["Dr. Smith went to Washington D.C. on Jan. 5th.", "He didn't come back!", '"Why?" she asked.'],
        ["See fig. 3.2 for details."],
        ["A third document follows.", "It has two sentences, i.e. not one."],
    ]
    with open(tmp_path / "text.jsonl", "w") as file:
        for sentences in documents_of:
            file.write(json.dumps({"text": " ".join(sentences[:2]) + "\n\n" + " ".join(sentences[2:])}) + "\n")
    flags = ["--split_sentences", "--validation_split_percentage", 0, "--test_split_percentage", 0]
    prepare(*flags, text=[tmp_path / "text.jsonl"])
    file = TokenFile(tmp_path / "out" / "train")
    assert file.metadata["unit"] == "sentence" and np.diff(file.documents).tolist() == [3, 1, 2]
    squeezed = ["".join(text.lower().split()) for text in documents(tmp_path / "out", "train")]
    assert squeezed == ["".join(text.lower().split()) for parts in documents_of for text in parts]
    assert ", 6 sentences, " in harness.run("prepare_pile_data.py", "inspect", tmp_path / "out").check().stdout


def test_bad_input_is_one_line_and_finished_shards_stay(prepare, corpus, tmp_path):
    assert "error: no text" in prepare_error(prepare, ["tokenize"])
    prepare()
    tokenizer = "--tokenizer_name", tmp_path / "out" / "tokenizer"
    (corpus / "c.jsonl").write_text('{"text": "fine"}\n{"other": 1}\n')
    for workers in (1, 2):
        flags, name = [*tokenizer, "--workers", workers], f"bad{workers}"
        error = prepare("tokenize", *flags, code=2, text=[corpus / "a.txt", corpus / "c.jsonl"], out=name).stderr
        assert f'{corpus / "c.jsonl"}:2: no column "text"' in error
        assert [path.name for path in (tmp_path / name / "shards").glob("*.bin")] == ["00000.bin"]
    (corpus / "d.txt.bz2").write_bytes(bz2.compress(b"some text\n" * 1000)[:-20])
    assert "cut off" in prepare(code=2, text=[corpus / "d.txt.bz2"], out="cut").stderr


def test_a_disk_that_fills_up(prepare, harness, corpus, tmp_path):
    prepare("--num_shards", 3)
    words = ["--num_shards", 3, "--tokenizer_name", tmp_path / "out" / "tokenizer", "--workers", 1]
    words += ["--input", corpus / "a.txt", corpus / "b.txt", "--output_dir", tmp_path / "full"]
    size = max(path.stat().st_size for path in (tmp_path / "out" / "shards").iterdir())
    most = size + 2048  # bytes in a file: enough for a shard, not for all of them
    limited = tmp_path / "limited.py"
    limited.write_text(
        "import resource, runpy, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most}))\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        f"runpy.run_path({str(REPOSITORY / 'prepare_pile_data.py')!r}, run_name='__main__')\n"
    )
    assert "cannot be written (File too large); make room" in harness.run(limited, *words).check(2).stderr
    assert len(list((tmp_path / "full" / "shards").glob("*.bin"))) == 3 and not list(
        (tmp_path / "full").rglob("*.tmp")
    )
    assert harness.run("prepare_pile_data.py", *words).check().stdout.count("finished already") == 3


@pytest.mark.parametrize("megabytes", [5, pytest.param(200, marks=pytest.mark.exhaustive)])
def test_one_large_document(prepare, tmp_path, megabytes):
    line = " ".join(texts(100)) + "\n"
    with open(tmp_path / "large.txt", "w") as file:
        for _ in range(megabytes * 10**6 // len(line)):
            file.write(line)
    flags = ["--document_separator", "file", "--tokenizer_name", tmp_path / "out" / "tokenizer"]
    prepare()
    flags += ["--validation_split_percentage", 0, "--test_split_percentage", 0]
    prepare(*flags, text=[tmp_path / "large.txt"], out="large")
    assert TokenFile(tmp_path / "large" / "train").num_documents == 1


def prepare_error(prepare, words):
    with pytest.raises(UserError) as caught:
        import prepare_pile_data

        sys.argv[1:] = words
        prepare_pile_data.main()
    return f"error: {caught.value}"


# ---- A look inside -------------------------------------------------------------------------------------------


def test_inspect(prepare, harness, tmp_path):
    prepare()
    said = harness.run("prepare_pile_data.py", "inspect", tmp_path / "out", "--num_samples", 2).check().stdout
    counts = {name: TokenFile(tmp_path / "out" / name).num_documents for name in ("train", "validation", "test")}
    for name, count in counts.items():
        assert f"{name}: {count:,} documents" in said
    assert said.count("  document ") == 2 and "word" in said and "unknown tokens: " in said
    assert (tmp_path / "out" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert "no such file" in harness.run("prepare_pile_data.py", "inspect", tmp_path / "none").check(2).stderr
