"""The loss of a language model's head on the positions that a batch names."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from common.models.cross_entropy import linear_cross_entropy, linear_losses
from common.models.sampling import random_bits, sample_tokens


@dataclass
class HeadLoss(ModelOutput):
    """loss: scalar, divided as the batch says; losses and correct: [B, k] float32 and bool, only outside training;
    sentence_losses and sentence_correct: [B, n], likewise, where there are pairs of sentences; token_losses and
    token_correct: [B, S], where a discriminator judges all tokens."""

    loss: torch.FloatTensor | None = None
    losses: torch.FloatTensor | None = None
    correct: torch.BoolTensor | None = None
    sentence_losses: torch.FloatTensor | None = None
    sentence_correct: torch.BoolTensor | None = None
    token_losses: torch.FloatTensor | None = None
    token_correct: torch.BoolTensor | None = None


def head_loss(model, hidden, labels, weights, loss_denominator, label_keys=None):
    """Loss of a model's output embedding. B rows, k positions in each, H hidden size.

    Args:
        model: stock transformers language model; its training mode decides what is computed.
        hidden: [B * k, H].
        labels: [B, k] int64; weights: [B, k] float32: 1, or 0 where nothing is predicted.
        loss_denominator: scalar float32.
        label_keys: [B] int64: labels of each row that are drawn from the model itself take the place of `labels`, and
            with what the model makes of the row depend on its key alone; None: they do not.
    Returns:
        HeadLoss.
    """
    head = model.get_output_embeddings()
    if label_keys is not None:
        keys = random_bits(label_keys, labels.shape[1]).flatten()
        labels = sample_tokens(hidden, head.weight, head.bias, keys).view_as(labels)
    if model.training:
        # divided at the end: weights of 0 and 1 round nothing, in whatever precision the gradient of the logits is
        total = linear_cross_entropy(hidden, head.weight, head.bias, labels.flatten(), weights.flatten())
        return HeadLoss(loss=total / loss_denominator)
    losses, correct = linear_losses(hidden, head.weight, head.bias, labels.flatten())
    losses, correct = losses.view_as(weights), correct.view_as(labels)
    return HeadLoss(loss=(losses * weights).sum() / loss_denominator, losses=losses, correct=correct)
