"""The unigram baseline and the initial output bias know the training documents, and nothing of the held-out ones."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.data.batches import EvalBatches, Masking
from common.data.packing import DocumentRows, Frame
from common.data.token_files import TokenFile, TokenFileWriter
from common.unigram import log_frequencies, start_from_frequencies, unigram_baseline
from plain import TOKENIZER

VOCAB_SIZE = 64
DOCUMENTS = [[10, 11, 11], [12] * 40, [11, 13], [14] * 30 + [11] * 8, [11, 10]]
HELD_OUT = [1, 3]  # their most frequent tokens, 12 and 14, stand in no other document


@pytest.fixture
def parts(tmp_path):
    """Views of one file: for training, held out."""
    with TokenFileWriter(tmp_path / "all", np.uint16) as writer:
        writer.append(np.array(sum(DOCUMENTS, [])), [len(document) for document in DOCUMENTS])
        writer.finish({"tokenizer_name": "none", "tokenizer_fingerprint": "0"})
    whole = TokenFile(tmp_path / "all")
    return whole.subset(np.array([0, 2, 4])), whole.subset(np.array(HELD_OUT))


def plain_shares(size):
    seen = Counter(token for number in (0, 2, 4) for token in DOCUMENTS[number])
    return np.array([(seen[token] + 1) / (seen.total() + size) for token in range(size)])


def test_frequencies_are_those_of_the_training_documents(parts):
    train, _ = parts
    assert np.exp(log_frequencies(train, VOCAB_SIZE)) == pytest.approx(plain_shares(VOCAB_SIZE))


def test_the_output_bias_knows_no_held_out_token(parts):
    head = torch.nn.Linear(4, VOCAB_SIZE)
    start_from_frequencies(SimpleNamespace(get_output_embeddings=lambda: head), parts[0])
    answer = torch.softmax(head.bias.double(), 0).tolist()
    assert answer == pytest.approx(plain_shares(VOCAB_SIZE))
    assert answer[12] == answer[14] == answer[50] < answer[13]  # as a token that never occurs


def test_the_baseline_is_judged_on_the_held_out_documents(parts, tmp_path):
    train, validation = parts
    rows = DocumentRows(validation, Frame.for_masked(TOKENIZER), 16, tmp_path / "rows")
    device = torch.device("cpu")
    eval_batches = EvalBatches(rows, Masking(0.15, VOCAB_SIZE, 4), 100, 3, 0, 1, device)
    labels = [
        label
        for batch in eval_batches.batches(range(eval_batches.number_of_batches))
        for label, weight in zip(batch["masked_labels"].ravel(), batch["masked_weights"].ravel(), strict=True)
        if weight
    ]
    assert 12 in labels and 14 in labels
    numbers = unigram_baseline(train, VOCAB_SIZE, eval_batches)
    shares = plain_shares(VOCAB_SIZE)
    assert numbers["unigram_loss"] == pytest.approx(np.mean([-np.log(shares[label]) for label in labels]))
    assert numbers["unigram_accuracy"] == pytest.approx(np.mean([label == shares.argmax() for label in labels]))
