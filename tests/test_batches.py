"""Masks and order: exact counts, 80/10/10, functions of position alone, the same whatever the cut."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.batches import EvalBatches, Masking, TrainBatches
from common.data.masking import choose_tokens, derive_key, permute, replace_tokens, targets_per_row
from common.data.packing import ConcatenatedRows, DocumentRows, Frame
from plain import TOKENIZER, token_file

CPU = torch.device("cpu")


def mask_rows(ids, is_text, keys, k, vocab_size, mask_id):
    return replace_tokens(ids, choose_tokens(is_text, keys, k), keys, vocab_size, mask_id)


def make_rows(tmp_path, documents=200, seq_length=32):
    lengths = np.random.default_rng(0).integers(1, 90, documents)
    file = token_file(lengths)
    file.tokens = (file.tokens % 900 + 10).astype(np.uint16)
    return DocumentRows(file, Frame.for_masked(TOKENIZER), seq_length, tmp_path)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(0, 20))
def test_exactly_k_targets_and_the_rest_untouched(seed, k, text_tokens):
    width = 24
    original = np.random.default_rng(seed).integers(10, 1000, (3, width))
    maskable = np.zeros((3, width), dtype=bool)
    maskable[:, 2 : 2 + text_tokens] = True
    ids = original.copy()
    positions, labels, weights = mask_rows(ids, maskable, derive_key(seed, np.arange(3)), k, 1000, 4)
    assert positions.shape == labels.shape == weights.shape == (3, k)
    for row in range(3):
        chosen = positions[row][weights[row] > 0]
        assert len(chosen) == len(set(chosen.tolist())) == min(k, text_tokens)
        assert maskable[row][chosen].all()
        untouched = np.setdiff1d(np.arange(width), chosen)
        assert (ids[row][untouched] == original[row][untouched]).all()
        if len(chosen):
            assert (labels[row] == original[row][positions[row]]).all()


def test_a_repeated_position_keeps_one_treatment():
    ids = np.full((1, 8), 50)
    maskable = np.zeros((1, 8), dtype=bool)
    maskable[0, 3] = True
    positions, labels, weights = mask_rows(ids, maskable, derive_key(1, np.arange(1)), 4, 1000, 4)
    assert positions.tolist() == [[3, 3, 3, 3]] and labels.tolist() == [[50] * 4] and weights.sum() == 1


def chi_square(counts, expected):
    return ((counts - expected) ** 2 / expected).sum()


def limit_of(degrees):
    """What chi-square stays below but once in a million times (Wilson and Hilferty's approximation)."""
    return degrees * (1 - 2 / (9 * degrees) + 4.75 * np.sqrt(2 / (9 * degrees))) ** 3


def test_80_10_10_of_every_rank_among_the_chosen_and_replacements_uniform():
    rows, width, k, vocab = 8000, 64, 10, 1000
    ids = np.full((rows, width), 77)
    positions, _, _ = mask_rows(ids, np.ones((rows, width), bool), derive_key(3, np.arange(rows)), k, vocab, 4)
    after = np.take_along_axis(ids, positions, axis=1)
    masked, kept = after == 4, after == 77
    replaced = ~masked & ~kept
    for rank in range(k):
        for hits, share in ((masked, 0.8 + 0.1 / vocab), (kept, 0.1 + 0.1 / vocab), (replaced, 0.1 - 0.2 / vocab)):
            assert abs(hits[:, rank].mean() - share) < 4.5 * np.sqrt(share * (1 - share) / rows)
    both = (replaced[:, :-1] & replaced[:, 1:]).mean()  # neighbours are treated independently
    assert abs(both - 0.01) < 4.5 * np.sqrt(0.01 / (rows * (k - 1)))
    counts = np.bincount(after[replaced], minlength=vocab)
    assert counts.argmax() < vocab == len(counts)
    counts = np.delete(counts, [4, 77])
    assert chi_square(counts, counts.mean()) < limit_of(len(counts) - 1)
    action_of_token = replaced.sum() / vocab  # a token's value has nothing to do with its position
    assert abs(np.corrcoef(after[replaced], positions[replaced])[0, 1]) < 4.5 / np.sqrt(action_of_token * vocab)


def test_every_position_and_every_pair_is_chosen_equally_often():
    rows, width, k = 40_000, 24, 4
    maskable = np.ones((rows, width), bool)
    maskable[:, [0, 9, 23]] = False
    text = np.flatnonzero(maskable[0])
    keys = derive_key(5, np.arange(rows))
    positions, _, _ = mask_rows(np.full((rows, width), 77), maskable, keys, k, 1000, 4)
    counts = np.bincount(positions.ravel(), minlength=width)
    assert counts[~maskable[0]].sum() == 0
    # the positions of a row are not independent: without replacement their counts vary less
    expected = rows * k / len(text)
    assert chi_square(counts[text], expected) / (1 - (k - 1) / (len(text) - 1)) < limit_of(len(text) - 1)
    pairs = np.zeros((width, width))
    for i in range(k):
        for j in range(i + 1, k):
            np.add.at(pairs, (positions[:, i], positions[:, j]), 1)
    seen = pairs[np.ix_(text, text)][np.triu_indices(len(text), 1)]
    assert chi_square(seen, seen.mean()) < limit_of(len(seen) - 1)
    following = (positions[:-1] == positions[1:]).all(axis=1).mean()  # rows are masked independently
    assert following < 2 / 5985 * 2  # one in 21 over 4


def test_rows_are_masked_alone_as_in_company():
    rng = np.random.default_rng(0)
    ids, maskable = rng.integers(10, 1000, (40, 33)), rng.random((40, 33)) < 0.7
    maskable[7] = False
    keys = derive_key(11, np.arange(40))
    together = ids.copy()
    targets = mask_rows(together, maskable, keys, 5, 1000, 4)
    for row in range(40):
        alone, part = ids[row : row + 1].copy(), slice(row, row + 1)
        for mine, all_ in zip(mask_rows(alone, maskable[part], keys[part], 5, 1000, 4), targets, strict=True):
            assert (mine == all_[part]).all()
        assert (alone == together[part]).all()
    assert (together[7] == ids[7]).all() and targets[2][7].sum() == 0


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5000), st.integers(0, 2**60))
def test_a_permutation_visits_everything_once(size, key):
    assert (np.sort(permute(np.arange(size), size, np.uint64(key))) == np.arange(size)).all()


def test_permutations_differ_and_look_shuffled():
    first = permute(np.arange(10_000), 10_000, derive_key(1, 0))
    second = permute(np.arange(10_000), 10_000, derive_key(1, 1))
    assert (first == second).mean() < 0.01
    assert abs(np.corrcoef(np.arange(10_000), first)[0, 1]) < 0.05
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.05


def take(batches, number):
    """The first micro-batches, copied."""
    stream = iter(batches)
    return [next(stream) for _ in range(number)]


def merge(*per_rank):
    """Micro-batches of several processes, in the order of the global batch."""
    return [item for step in zip(*per_rank, strict=True) for item in step]


def assert_same(left, right):
    for (a, number_a, tokens_a), (b, number_b, tokens_b) in zip(left, right, strict=True):
        assert number_a == number_b and tokens_a == tokens_b
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_cut_does_not_change_the_micro_batches_and_a_resume_continues_them(tmp_path):
    rows = make_rows(tmp_path)
    masking = Masking(0.15, 910, 4)
    one = take(TrainBatches(rows, masking, 7, 4, 4, 0, 1, CPU), 80)  # goes well into the second epoch
    two = [take(TrainBatches(rows, masking, 7, 4, 2, rank, 2, CPU), 40) for rank in range(2)]
    assert_same(one, merge(*two))
    resumed = take(TrainBatches(rows, masking, 7, 4, 4, 0, 1, CPU, consumed_rows=16 * 3), 12)
    assert_same(one[12:24], resumed)


@pytest.mark.parametrize("located, built", [(1, 1), (50, 900), (100_000, 100_000)])
def test_how_many_rows_are_built_at_once_changes_nothing(tmp_path, monkeypatch, located, built):
    rows, masking = make_rows(tmp_path), Masking(0.15, 910, 4)
    stream = lambda: TrainBatches(rows, masking, 7, 4, 3, 1, 2, CPU, consumed_rows=24 * 9)  # noqa: E731
    expected = take(stream(), 60)
    monkeypatch.setattr("common.data.batches.LOCATED_ROWS", located)
    monkeypatch.setattr("common.data.batches.BUILT_TOKENS", built)
    assert_same(take(stream(), 60), expected)


def test_the_stream_is_what_making_one_batch_after_another_gives(tmp_path):
    rows, masking = make_rows(tmp_path), Masking(0.15, 910, 4)
    stream = TrainBatches(rows, masking, 7, 4, 2, 0, 1, CPU)
    for number, (batch, micro_batch, tokens) in enumerate(take(stream, 2 * len(rows) // 4)):
        epoch, row = stream.locate(np.arange(4 * number, 4 * number + 4))
        plain = masking.make_batch(rows, row, derive_key(7, epoch, row))
        assert all((batch[name].numpy() == plain[name]).all() for name in plain)
        assert all(batch[name].numpy().dtype == plain[name].dtype for name in plain)
        places = np.arange(8 * (number // 2), 8 * (number // 2) + 8)
        built = rows.build(stream.locate(places)[1])
        assert micro_batch == number % 2 and tokens == (built["document_ids"] > 0).sum()
        weight = np.minimum(built["is_text"].sum(axis=1), targets_per_row(0.15, rows.seq_length)).sum()
        assert batch["loss_denominator"] == np.float32(weight / 2)


def test_smaller_micro_batches_hold_the_same_global_batch_and_loss_weight(tmp_path):
    rows = make_rows(tmp_path)
    masking = Masking(0.15, 910, 4)
    large = take(TrainBatches(rows, masking, 7, 8, 1, 0, 1, CPU), 1)
    small = take(TrainBatches(rows, masking, 7, 2, 4, 0, 1, CPU), 4)
    for name in ("input_ids", "masked_positions", "masked_weights"):
        assert torch.equal(large[0][0][name], torch.cat([batch[name] for batch, _, _ in small]))
    weight = large[0][0]["masked_weights"].sum()
    assert large[0][0]["loss_denominator"] == weight
    assert all(torch.isclose(batch["loss_denominator"] * 4, weight) for batch, _, _ in small)
    assert large[0][2] == (large[0][0]["document_ids"] > 0).sum()


@pytest.mark.parametrize("rates", [(0.3, 0.15), (0.1, 0.5)])
def test_a_rate_that_changes_with_the_place_in_the_run(tmp_path, rates):
    """Ankner et al. 2023: linear in what is over of the run, whatever the cut and the number of processes."""
    rows, total = make_rows(tmp_path), 16 * 20
    masking = Masking(rates[0], 910, 4, rates[1])
    stream = partial(TrainBatches, rows, masking, 7, 4, device=CPU, total_rows=total)
    one = take(stream(accumulation=4, rank=0, ranks=1), 4 * 24)  # goes on behind the end
    for number, (batch, _, _) in enumerate(one):
        assert batch["masked_weights"].shape == (4, round(max(rates) * 32))
        for row in range(4):
            share = min(1, (4 * number + row) / total)
            text = int((batch["document_ids"][row] > 0).sum()) - 2 * int(batch["document_ids"][row].max())
            expected = min(text, round((rates[0] + (rates[1] - rates[0]) * share) * 32))
            positions = batch["masked_positions"][row][batch["masked_weights"][row] > 0].tolist()
            assert len(positions) == len(set(positions)) == expected
        step = one[number - number % 4 : number - number % 4 + 4]
        assert batch["loss_denominator"] * 4 == sum(part["masked_weights"].sum() for part, _, _ in step)
    two = [take(stream(accumulation=2, rank=rank, ranks=2), 48) for rank in range(2)]
    resumed = take(stream(accumulation=4, rank=0, ranks=1, consumed_rows=16 * 3), 12)
    for name in ("input_ids", "masked_positions", "masked_labels", "masked_weights"):
        for number, (batch, _, _) in enumerate(one):
            assert torch.equal(batch[name], two[number % 2][number // 2][0][name])
        for batch, again in zip(one[12:24], resumed, strict=True):
            assert torch.equal(batch[0][name], again[0][name])


def test_an_epoch_uses_every_row_once_and_masks_change_between_epochs(tmp_path):
    rows = make_rows(tmp_path)
    stream = TrainBatches(rows, Masking(0.15, 910, 4), 7, 1, 1, 0, 1, CPU)
    epoch, row = stream.locate(np.arange(2 * len(rows)))
    assert (np.sort(row[: len(rows)]) == np.arange(len(rows))).all() and (epoch == np.repeat([0, 1], len(rows))).all()
    batches = take(stream, 2 * len(rows))
    first = {r: b for r, (b, _, _) in zip(row[: len(rows)], batches[: len(rows)], strict=True)}
    second = {r: b for r, (b, _, _) in zip(row[len(rows) :], batches[len(rows) :], strict=True)}
    same = np.mean([torch.equal(first[r]["masked_positions"], second[r]["masked_positions"]) for r in first])
    assert same < 0.05


def test_another_seed_gives_another_order(tmp_path):
    rows = make_rows(tmp_path)
    a, b = (take(TrainBatches(rows, Masking(0.15, 910, 4), seed, 4, 1, 0, 1, CPU), 1)[0][0] for seed in (1, 2))
    assert not torch.equal(a["input_ids"], b["input_ids"])


def test_validation_is_the_same_for_any_cut_rate_and_process_count(tmp_path):
    rows = make_rows(tmp_path)

    def targets(batch_size, ranks, rate):
        parts = [EvalBatches(rows, Masking(rate, 910, 4), 50, batch_size, rank, ranks, CPU) for rank in range(ranks)]
        merged = merge(*[list(part) for part in parts])
        kept = [batch["masked_weights"].bool() for batch in merged]
        return torch.cat([batch["masked_labels"][keep] for batch, keep in zip(merged, kept, strict=True)])

    expected = targets(50, 1, 0.15)
    assert len(expected) > 100
    for batch_size, ranks, rate in ((7, 1, 0.15), (8, 3, 0.15), (16, 2, 0.4)):
        assert torch.equal(targets(batch_size, ranks, rate), expected)


def test_an_error_while_making_batches_reaches_the_loop(tmp_path):
    rows = make_rows(tmp_path)
    rows.lengths = SimpleNamespace()  # cannot be indexed
    try:
        next(iter(TrainBatches(rows, Masking(0.15, 910, 4), 7, 4, 1, 0, 1, CPU)))
    except TypeError as error:
        assert "subscriptable" in str(error)
    else:
        raise AssertionError("the error was lost")


def test_concatenated_rows_make_the_same_kind_of_batch(tmp_path):
    file = token_file(np.random.default_rng(0).integers(1, 90, 100))
    rows = ConcatenatedRows(file, Frame.for_masked(TOKENIZER), 32)
    batch, _, tokens = take(TrainBatches(rows, Masking(0.15, 9000, 4), 7, 4, 1, 0, 1, CPU), 1)[0]
    assert tokens == 4 * 32 and (batch["document_ids"] == 1).all() and batch["masked_weights"].min() == 1
