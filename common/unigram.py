"""What can be said of a token without its context: where a model starts, and what it is compared with."""

import numpy as np
import torch


def log_frequencies(token_file, size):
    """Logarithm of each token's share of a text.

    Args:
        token_file: common.data.token_files.TokenFile; of a very long text the beginning counts.
        size: int, above every token; each is counted once more than it occurs.
    Returns:
        [size] float64, in nats.
    """
    counts = token_file.token_counts(size) + 1.0
    return np.log(counts / counts.sum())


def start_from_frequencies(model, token_file):
    """Set the output bias so that an untrained model answers with the training text's token frequencies.

    The model need not spend its first steps on learning them through its hidden states, where post-LN encoders get
    stuck for hundreds of steps.

    Args:
        model: language model with an output bias, still unprepared.
        token_file: TokenFile of the training text.
    """
    bias = model.get_output_embeddings().bias
    with torch.no_grad():
        bias.copy_(torch.from_numpy(log_frequencies(token_file, len(bias))))


def unigram_baseline(token_file, vocab_size, eval_batches):
    """Loss and accuracy of always answering with the training text's token frequencies.

    Args:
        token_file: TokenFile of the training text; vocab_size: int, above every token of both texts.
        eval_batches: common.data.batches.EvalBatches; all of its batches are used, whatever the process.
    Returns:
        dict: unigram_loss in nats, unigram_accuracy.
    """
    loss = -log_frequencies(token_file, vocab_size)
    sums = np.zeros(3)
    for batch in eval_batches.batches(range(eval_batches.number_of_batches)):
        labels, weights = batch[eval_batches.objective.labels], batch[eval_batches.objective.weights]
        sums += [(loss[labels] * weights).sum(), ((labels == loss.argmin()) * weights).sum(), weights.sum()]
    return {"unigram_loss": sums[0] / sums[2], "unigram_accuracy": sums[1] / sums[2]}
