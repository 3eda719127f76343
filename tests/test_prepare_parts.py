"""Parts of prepare_pile_data.py by themselves: blocks of text, shards, what is known of documents, commands."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest

from common.data.blocks import BadRecords
from common.data.documents import read_blocks
from common.errors import UserError
from common.prepare.arguments import chosen_shards, parse_command
from common.prepare.facts import FactsWriter
from common.prepare.inputs import TextFile
from common.prepare.merge import split_of
from common.prepare.repeated import Repeated
from common.prepare.shards import FinishedShard, Window, plan_shards
from common.prepare.tokenize import shard_blocks

LINES = [
    b"plain",
    b"",
    b"  spaces around\t",
    b"caf\xc3\xa9 \xe6\xbc\xa2",
    b"\xff not UTF-8",
    b" \x0b ",
    b"a\rb\xe2\x80\xa8c",
    b"\x1cx",
]


def plain_version(data):
    """The documents of lines, and the numbers of those that are not UTF-8, one line after the other."""
    documents, bad = [], []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            bad.append(number)
            continue
        if text:
            documents.append(text)
    return documents, bad


@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("step", [1, 3])
def test_lines_in_blocks_are_lines_one_by_one(monkeypatch, tmp_path, size, step):
    monkeypatch.setattr("common.data.documents.BLOCK_SIZE", size)
    chance = random.Random(size)
    data = b"\xef\xbb\xbffirst\n" + b"\n".join(chance.choices(LINES, k=500)) + b"\nno line end"
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf{not JSON}\r\n"
        + b"".join(b'{"text": "' + line.strip() + b' 1"}\n' for line in chance.choices(LINES[:4], k=50))
    )
    documents, bad = plain_version(data)
    records = [json.loads(line)["text"].strip() for line in (tmp_path / "a.jsonl").read_text().split("\n")[1:-1]]
    for name, expected, faults in (("a.txt", documents, bad), ("a.jsonl", records, [1])):
        found, counted = [], BadRecords(len(faults))
        args = SimpleNamespace(text_column="text", document_separator="line")
        for first in range(step):
            for block in TextFile(tmp_path / name).blocks(args, counted, first, step):
                found += [text for text, _ in block.documents(counted)]
        assert counted.count == len(faults)
        assert (found if step == 1 else sorted(found)) == (expected if step == 1 else sorted(expected))
    blocks = list(read_blocks([tmp_path / "a.txt"], "text", "line", None))
    assert b"".join(block.data for block in blocks) == data and (len(blocks) > 1) == (size < 1 << 20)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("separator", ["line", "blank_line"])
def test_every_document_is_in_one_shard(monkeypatch, tmp_path, count, separator):
    for module in ("blocks", "documents"):
        monkeypatch.setattr(f"common.data.{module}.BLOCK_SIZE", 30)
    for name in "abc":
        (tmp_path / name).write_text("".join(f"{name}{number}\n\n" for number in range(40)))
    args = SimpleNamespace(text_column="text", document_separator=separator)
    shards = plan_shards([TextFile(tmp_path / name) for name in "abc"], count)
    read = [
        [text for block, _ in shard_blocks(shard, args, BadRecords(), print) for text, _ in block.documents(None)]
        for shard in shards
    ]
    assert sorted(sum(read, [])) == sorted(f"{name}{number}" for name in "abc" for number in range(40))
    assert max(map(len, read)) <= 2 * min(map(len, read))  # of 120 / count


def test_what_is_compared_in_pieces_is_what_is_compared_at_once(monkeypatch, tmp_path):
    chance = np.random.default_rng(0)
    found = [chance.integers(0, 2**64, 40, np.uint64, endpoint=False) for _ in range(3)]
    found[1][:10], found[2][5:9], found[2][20] = found[0][3:13], found[1][20:24], found[2][0]
    found[0][0], found[2][30] = 2**64 - 1, 2**64 - 1

    class Shard:
        num_documents = 40

        def __init__(self, hashes):
            self.columns = {"documents": hashes.argsort(kind="stable")}
            self.columns["hashes"] = hashes[self.columns["documents"]]

        def column(self, name):
            return self.columns[name]

    everything = Window(None, slice(None), slice(None))
    for compared in (7, 1000):
        monkeypatch.setattr("common.prepare.repeated.COMPARED", compared)
        seen = set()
        with Repeated([Shard(hashes) for hashes in found], tmp_path) as repeated:
            repeated.find_documents()
            for number, hashes in enumerate(found):
                for value, kept in zip(hashes.tolist(), repeated.kept(number, everything), strict=True):
                    assert kept == (value not in seen)
                    seen.add(value)


@pytest.mark.parametrize("kind", ["lines", "hashes"])
def test_facts_sorted_on_the_disk_are_those_sorted_at_once(monkeypatch, tmp_path, kind):
    monkeypatch.setattr("common.prepare.facts.BLOCK", 7)
    chance = np.random.default_rng(1)
    values = chance.integers(0, 2**64, 200, np.uint64, endpoint=False)
    values[50:60], values[70:75], values[80] = values[3], 2**64 - 1, 0
    parts = np.split(values, [13, 14, 14, 60])
    with FactsWriter(tmp_path / "some.facts") as writer:
        for part in parts:
            number = np.arange(len(part))
            columns = {"sources": number, "characters": number * 3, "words": number + 1, "hashes": part}
            writer.append(columns | ({"lines": part} if kind == "lines" else {}))
        found = writer.finish()
    shard = FinishedShard(None, tmp_path / "some.facts", {"num_documents": len(values), "facts": found})
    names = ("lines", "sequences") if kind == "lines" else ("hashes", "documents")
    order = np.argsort(values, kind="stable")
    order = order[values[order] != 0] if kind == "lines" else order
    assert shard.column(names[1]).tolist() == order.tolist()
    assert shard.column(names[0]).tolist() == values[order].tolist()
    assert shard.column("characters").tolist() == [3 * at for part in parts for at in range(len(part))]
    assert [path.name for path in tmp_path.iterdir()] == ["some.facts"]


def test_splits_follow_the_hash_alone():
    hashes = np.array([0, 2**63 - 1, 2**63, 2**63 + 2**62 - 1, 2**63 + 2**62, 2**64 - 1], np.uint64)
    assert split_of(hashes, 50, 25).tolist() == [1, 1, 2, 2, 0, 0]
    assert split_of(hashes, 0, 0).tolist() == [0] * 6


def test_which_shards():
    assert chosen_shards([], None, 4) == [0, 1, 2, 3] == chosen_shards(["0", "3"], None, 4)
    assert chosen_shards(["2"], None, 4) == [2] == chosen_shards([], 2, 4)
    assert chosen_shards(["0,3"], None, 4) == [0, 3] == chosen_shards(["3", "0", "0"], None, 4)
    for words in (["4"], ["0", "9"], ["x"], ["-1"], [","]):
        with pytest.raises(UserError):
            chosen_shards(words, None, 4)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tokenise"], "'tokenise' is no command: give download, tokenize, merge, inspect"),
        (["inspect"], "inspect takes one path"),
        (["tokenize", "1", "--shard_index", "2"], "give one of them"),
        (["--validation_split_percentage", "60", "--test_split_percentage", "40"], "leave nothing for training"),
        (["--workers", "0"], "--workers 0 is too small"),
    ],
)
def test_bad_commands(words, expected):
    with pytest.raises(UserError, match=expected):
        parse_command(words)
