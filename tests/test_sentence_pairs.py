"""Pairs of sentences against a plain version, document by document, and the loss against stock transformers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_batches import chi_square, limit_of
from transformers import AlbertForPreTraining, BertForPreTraining, MegatronBertForPreTraining

from common.arguments import DataArguments, ModelArguments
from common.data.batches import EvalBatches, Masking, TrainBatches
from common.data.masking import PAIR_STREAM, derive_key, random_bits
from common.data.packing import Frame
from common.data.sentence_pairs import SentencePairs
from common.errors import UserError
from common.models.layers import use_attention
from common.models.mlm import build_mlm_model
from plain import TOKENIZER

CPU = torch.device("cpu")
VOCABULARY = 300
STOCK = {"bert": BertForPreTraining, "megatron-bert": MegatronBertForPreTraining, "albert": AlbertForPreTraining}


def sentence_file(seed, documents, longest=30):
    """Documents of none to a dozen sentences, some of them empty; every token is another number."""
    chance = np.random.default_rng(seed)
    counts = chance.integers(0, 13, documents)
    lengths = chance.integers(0, longest, counts.sum()).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    tokens = np.arange(10, 10 + lengths.sum(), dtype=np.int32)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    facts = {"tokens": tokens, "starts": starts, "lengths": lengths, "documents": bounds}
    return SimpleNamespace(**facts, metadata=None, prefix="file")


def plain_rows(file, seq_length):
    """(document, pieces) of each row, with Python's lists."""
    room, rows = seq_length - 3, []
    for document, (begin, end) in enumerate(zip(file.documents[:-1], file.documents[1:], strict=True)):
        pieces = []
        for start, length in zip(file.starts[begin:end], file.lengths[begin:end], strict=True):
            sentence = file.tokens[start : start + length].tolist()
            pieces += [sentence[at : at + room // 2] for at in range(0, length, room // 2)]
        if len(pieces) < 2:
            continue
        at = 0
        while at < len(pieces):
            row = []
            while at < len(pieces) and sum(map(len, row)) + len(pieces[at]) <= room:
                row.append(pieces[at])
                at += 1
            rows.append((document, row if len(row) > 1 else [pieces[at - 2], *row]))
    return rows


def plain_row(rows, number, key, objective, seq_length):
    """One row as lists: ids, token types, label."""
    to_split, to_change, to_choose, to_split_other = (
        int(random_bits(derive_key(key, PAIR_STREAM), n)) for n in range(4)
    )
    document, pieces = rows[number]
    split = 1 + to_split % (len(pieces) - 1)
    first, second = sum(pieces[:split], []), sum(pieces[split:], [])
    changed = to_change < 2**63
    if changed and objective == "sop":
        first, second = second, first
    elif changed:
        others = [pieces for other, pieces in rows if other != document]
        pieces = others[to_choose % len(others)]
        second = sum(pieces[1 + to_split_other % (len(pieces) - 1) :], [])[: seq_length - 3 - len(first)]
    ids = [2, *first, 3, *second, 3]
    return ids, [0] * (len(first) + 2) + [1] * (len(second) + 1), int(changed)


@pytest.mark.parametrize("objective", ["sop", "nsp"])
@pytest.mark.parametrize("seq_length", [8, 40, 128])
def test_equal_to_a_plain_version(objective, seq_length):
    file = sentence_file(seq_length, 1000, longest=min(30, seq_length))  # the plain version looks at all pairs of rows
    rows, plain = SentencePairs(file, Frame.for_masked(TOKENIZER), seq_length, objective), plain_rows(file, seq_length)
    assert len(rows) == len(plain) and len({document for document, _ in plain}) > 800
    row, keys = np.arange(len(rows)), derive_key(3, np.arange(len(rows)))
    batch = rows.build(row, keys)
    for number in row:
        ids, types, label = plain_row(plain, number, keys[number], objective, seq_length)
        used = len(ids)
        assert batch["input_ids"][number].tolist() == ids + [0] * (seq_length - used)
        assert batch["token_type_ids"][number].tolist() == types + [0] * (seq_length - used)
        assert batch["document_ids"][number].tolist() == [1] * used + [0] * (seq_length - used)
        assert batch["position_ids"][number].tolist() == [*range(used)] + [0] * (seq_length - used)
        assert batch["is_text"][number].tolist() == [token >= 10 for token in ids] + [False] * (seq_length - used)
        assert batch["sentence_labels"][number].tolist() == [label]
    assert (rows.real_tokens(row, keys) == batch["document_ids"].sum(axis=1)).all()
    assert (rows.text_tokens(row, keys) == batch["is_text"].sum(axis=1)).all()
    assert (batch["cls_positions"] == 0).all() and (batch["sentence_weights"] == 1).all()
    some = np.array([5, 2, 5])
    alone = rows.build(some, keys[some])
    assert all((alone[name] == batch[name][some]).all() for name in batch)


def test_half_are_changed_and_every_split_and_other_document_is_as_likely():
    number = 20_000
    lengths = np.full(60, 4, np.int32)
    file = SimpleNamespace(tokens=np.arange(10, 250), starts=np.arange(60) * 4, lengths=lengths, metadata=None)
    file.documents, file.prefix = np.arange(0, 61, 6), "file"  # ten documents of six sentences
    rows = SentencePairs(file, Frame.for_masked(TOKENIZER), 27, "nsp")
    assert len(rows) == 10
    keys = derive_key(1, np.arange(number))
    batch = rows.build(np.full(number, 3), keys)
    changed = batch["sentence_labels"][:, 0] == 1
    assert abs(changed.mean() - 0.5) < 4.5 * 0.5 / np.sqrt(number)
    first = (batch["token_type_ids"] == 0).argmin(axis=1)  # where the second text begins
    splits = np.bincount(first // 4)[1:]
    assert len(splits) == 5 and chi_square(splits, number / 5) < limit_of(4)
    begins = batch["input_ids"][np.arange(number), first]
    others = np.bincount((begins[changed] - 10) // 24, minlength=10)
    assert others[3] == 0 and chi_square(np.delete(others, 3), changed.sum() / 9) < limit_of(8)
    assert ((begins[~changed] - 10) // 24 == 3).all()


def make_batch(objective="sop", rate=0.3, number=6):
    file = sentence_file(4, 60)
    file.tokens = file.tokens % (VOCABULARY - 10) + 10
    rows = SentencePairs(file, Frame.for_masked(TOKENIZER), 48, objective)
    return rows, next(iter(TrainBatches(rows, Masking(rate, VOCABULARY, 4), 7, number, 1, 0, 1, CPU)))[0]


def test_as_many_are_masked_as_the_length_of_a_row_says():
    rows, batch = make_batch(number=32)
    lengths = batch["document_ids"].sum(dim=1)
    expected = [round(0.3 * length) for length in lengths.tolist()]
    assert batch["masked_weights"].sum(dim=1).tolist() == expected and len(set(expected)) > 5
    assert batch["loss_denominator"] == sum(expected)


class Tokenizer:
    pad_token_id = 0

    def get_vocab(self):
        return {str(token): token for token in range(VOCABULARY)}


def build(family):
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    data = DataArguments(max_seq_length=48, sentence_objective="sop")
    torch.manual_seed(0)
    model = build_mlm_model(ModelArguments(model_type=family, **shape), data, Tokenizer())
    use_attention(model, "sdpa")
    return model


@pytest.mark.parametrize("family", STOCK)
def test_loss_and_gradient_equal_stock_transformers(family, tmp_path):
    ours = build(family).train()
    ours.save_pretrained(tmp_path)
    stock, info = STOCK[family].from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    stock.train()
    if family == "albert":
        stock.sop_classifier.dropout.p = 0.0
    _, batch = make_batch()
    labels = torch.full_like(batch["input_ids"], -100)
    row, column = (batch["masked_weights"] > 0).nonzero(as_tuple=True)
    labels[row, batch["masked_positions"][row, column]] = batch["masked_labels"][row, column]
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["document_ids"]}
    given |= {"token_type_ids": batch["token_type_ids"], "labels": labels}
    name = "sentence_order_label" if family == "albert" else "next_sentence_label"
    expected = stock(**given, **{name: batch["sentence_labels"][:, 0]}).loss
    loss = ours(**batch).loss
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    loss.backward()
    expected.backward()
    mine = {name: p.grad for name, p in ours.named_parameters()}
    theirs = {name: p.grad for name, p in stock.named_parameters()}
    assert mine.keys() == theirs.keys()
    difference = sum(((mine[name] - theirs[name]) ** 2).sum() for name in mine).sqrt()
    assert difference / sum((theirs[name] ** 2).sum() for name in theirs).sqrt() < 1e-5


def test_validation_counts_every_pair_once():
    rows, _ = make_batch()
    number = len(rows)
    for batch_size in (5, number):
        batches = EvalBatches(rows, Masking(0.4, VOCABULARY, 4), number, batch_size, 0, 1, CPU)
        pairs = 0
        for batch in batches:
            pairs += int(batch["sentence_weights"].sum())
            assert ((batch["masked_weights"].sum(dim=1) > 0) == (batch["sentence_weights"][:, 0] > 0)).all()
        assert pairs == number


def test_whole_documents_are_refused():
    file = sentence_file(1, 50)
    frame = Frame.for_masked(TOKENIZER)
    whole = SimpleNamespace(**{**vars(file), "documents": np.arange(len(file.lengths) + 1)})
    marked = SimpleNamespace(**{**vars(file), "metadata": {"unit": "document"}})
    for wrong in (whole, marked):
        with pytest.raises(UserError, match="--split_sentences"):
            SentencePairs(wrong, frame, 32, "sop")
    one = SimpleNamespace(**{**vars(file), "documents": np.array([0, len(file.lengths)])})
    with pytest.raises(UserError, match="two documents"):
        SentencePairs(one, frame, 32, "nsp")
    assert len(SentencePairs(one, frame, 32, "sop"))
    file.starts[7] += 1
    with pytest.raises(UserError, match="do not follow each other"):
        SentencePairs(file, frame, 32, "sop")


def test_families_without_a_head_for_pairs_are_refused():
    with pytest.raises(UserError, match="roberta has no head for pairs of sentences: choose bert"):
        build("roberta")
