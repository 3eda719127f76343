"""Rows: every token once, never across documents, whatever the documents' lengths."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.packing import ConcatenatedRows, DocumentRows, Frame, build_rows, histogram_pack
from common.data.ranges import ranges, window
from common.errors import UserError
from plain import TOKENIZER, token_file


def plain_concatenation(file, seq_length):
    """The example's way: one list, cut into rows; the rest dropped."""
    stream = []
    for start, length in zip(file.starts, file.lengths, strict=True):
        stream += [2, *file.tokens[start : start + length].tolist(), 3]
    stream = stream[: len(stream) // seq_length * seq_length]
    return np.array(stream).reshape(-1, seq_length)


lengths_of_documents = st.lists(st.integers(1, 60), min_size=1, max_size=60).filter(lambda lengths: sum(lengths) >= 16)


@settings(deadline=None, max_examples=60)
@given(lengths_of_documents, st.integers(8, 18))
def test_every_token_is_used_once_and_documents_stay_apart(tmp_path_factory, lengths, seq_length):
    file = token_file(lengths)
    rows = DocumentRows(file, Frame.for_masked(TOKENIZER), seq_length, tmp_path_factory.mktemp("plan"))
    everything = np.arange(len(rows))
    batch = rows.build(everything)
    ids, documents, maskable = batch["input_ids"], batch["document_ids"], batch["is_text"]
    assert sorted(ids[maskable].tolist()) == file.tokens.tolist()
    assert (rows.text_tokens(everything) == maskable.sum(axis=1)).all()
    assert (rows.real_tokens(everything) == (documents > 0).sum(axis=1)).all()
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for row in range(len(rows)):
        for number in range(1, documents[row].max() + 1):
            piece = ids[row][documents[row] == number]
            text = piece[1:-1]
            assert (piece[0], piece[-1]) == (2, 3)
            assert (np.diff(text) == 1).all() and len(set(owner[text - 10])) == 1
            assert (batch["position_ids"][row][documents[row] == number] == np.arange(len(piece))).all()
        assert (ids[row][documents[row] == 0] == 0).all()


@settings(deadline=None, max_examples=60)
@given(lengths_of_documents, st.integers(8, 18))
def test_concatenated_rows_equal_the_plain_way(lengths, seq_length):
    file = token_file(lengths)
    rows = ConcatenatedRows(file, Frame.for_masked(TOKENIZER), seq_length)
    everything = np.arange(len(rows))
    batch = rows.build(everything)
    expected = plain_concatenation(file, seq_length)
    assert (batch["input_ids"] == expected).all()
    assert (batch["is_text"] == (expected >= 10)).all()
    assert (rows.text_tokens(everything) == (expected >= 10).sum(axis=1)).all()
    assert (rows.real_tokens(everything) == (expected > 0).sum(axis=1)).all()


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=300))
def test_histogram_packing_is_valid_and_as_tight_as_plain_best_fit(lengths):
    capacity = 24
    order, row_ends = histogram_pack(lengths, capacity)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    rows = np.split(np.asarray(lengths)[order], row_ends[:-1])
    assert all(1 <= row.sum() <= capacity for row in rows)
    free = []  # plain best fit, longest first
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in free if space >= length]
        if fitting:
            free.remove(min(fitting))
        free.append((min(fitting) if fitting else capacity) - length)
    assert len(rows) <= len(free)


def test_a_plan_is_reused(tmp_path):
    file = token_file([30, 5, 5, 12])
    first = DocumentRows(file, Frame.for_masked(TOKENIZER), 16, tmp_path).build(np.arange(4))
    plan = next(tmp_path.glob("rows-*")) / "plan.json"
    written = plan.stat().st_mtime_ns
    second = DocumentRows(file, Frame.for_masked(TOKENIZER), 16, tmp_path).build(np.arange(4))
    assert plan.stat().st_mtime_ns == written
    assert all((first[name] == second[name]).all() for name in first)
    assert [path.name for path in tmp_path.iterdir()] == [plan.parent.name]


@pytest.mark.parametrize("name", ["plan.json", "row_ends.bin", "row_tokens.bin", "starts.bin", "lengths.bin"])
@pytest.mark.parametrize("damage", ["cut off", "missing"])
def test_a_damaged_plan_is_made_again(tmp_path, name, damage):
    file = token_file([30, 5, 5, 12])
    DocumentRows(file, Frame.for_masked(TOKENIZER), 16, tmp_path)
    path = next(tmp_path.glob("rows-*")) / name
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[:-1])
    rows = DocumentRows(file, Frame.for_masked(TOKENIZER), 16, tmp_path)
    batch = rows.build(np.arange(len(rows)))
    assert sorted(batch["input_ids"][batch["is_text"]].tolist()) == file.tokens.tolist()
    assert path.read_bytes() == whole


def test_a_plan_that_cannot_be_put_in_place_is_no_success(tmp_path):
    file = token_file([30, 5, 5, 12])
    DocumentRows(file, Frame.for_masked(TOKENIZER), 16, tmp_path)
    folder = next(tmp_path.glob("rows-*"))
    folder.rename(tmp_path / "aside")
    folder.write_text("a file in its place")
    with pytest.raises(OSError):
        DocumentRows(file, Frame.for_masked(TOKENIZER), 16, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aside", folder.name]


def test_a_plan_of_many_blocks_uses_every_token_once(tmp_path, monkeypatch):
    file = token_file([30, 5, 0, 5, 100, 12, 1, 1, 1, 40])
    monkeypatch.setattr("common.data.packing.BLOCK_SEGMENTS", 4)  # the document of 100 tokens is in three of them
    rows = DocumentRows(file, Frame.for_masked(TOKENIZER), 16, tmp_path)
    everything = np.arange(len(rows))
    batch = rows.build(everything)
    assert sorted(batch["input_ids"][batch["is_text"]].tolist()) == file.tokens.tolist()
    assert (rows.text_tokens(everything) == batch["is_text"].sum(axis=1)).all()
    assert (rows.real_tokens(everything) == (batch["document_ids"] > 0).sum(axis=1)).all()


@given(st.data(), st.lists(st.integers(0, 9), min_size=1).filter(any))
def test_a_window_holds_what_lies_inside(data, sizes):
    first = data.draw(st.integers(0, sum(sizes) - 1))
    last = data.draw(st.integers(first + 1, sum(sizes)))
    everything = [(number, place) for number, size in enumerate(sizes) for place in range(size)]
    piece, skipped, size = window(np.concatenate([[0], np.cumsum(sizes)]), first, last)
    inside = zip(np.repeat(piece, size).tolist(), ranges(skipped, size).tolist(), strict=True)
    assert list(inside) == everything[first:last]


def test_less_than_one_row_is_refused(tmp_path):
    with pytest.raises(UserError, match="--max_seq_length 128"):
        build_rows(token_file([20]), Frame.for_masked(TOKENIZER), 128, "documents", tmp_path)
