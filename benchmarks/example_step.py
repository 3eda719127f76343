"""What the training steps of Hugging Face's examples without a trainer have in common."""

import json
import statistics
import time
from itertools import chain

import torch


def cut_into_rows(texts, length):
    """Rows of one length from a stream of tokens, as the examples' group_texts cuts them.

    Args:
        texts: datasets.Dataset of what a tokenizer returns; length: tokens in a row.
    Returns:
        datasets.Dataset; what is left at the end of a thousand texts is dropped.
    """

    def cut(examples):
        joined = {name: list(chain(*values)) for name, values in examples.items()}
        total = len(joined["input_ids"]) // length * length
        return {name: [value[at : at + length] for at in range(0, total, length)] for name, value in joined.items()}

    return texts.map(cut, batched=True)


def adamw(model, learning_rate, not_decayed, fused=None):
    """The examples' optimizer: torch's AdamW with two groups, neither of which decays by default.

    Args:
        not_decayed: parts of the names of the second group's parameters.
    """
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if not any(part in n for part in not_decayed)], "weight_decay": 0.0},
        {"params": [p for n, p in named if any(part in n for part in not_decayed)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=fused)


def print_speed(accelerator, model, optimizer, loader, schedule, loss_of, warm_up, steps):
    """Train, and print the speed of the steps after the first ones as a JSON object.

    Args:
        accelerator: the rest is as it prepared it.
        loss_of: function of a batch.
        warm_up: steps that are not timed; steps: those that are.
    """
    model.train()
    times, tokens = [], []
    batches = iter(loader)
    for step in range(warm_up + steps):
        began = time.perf_counter()  # the examples collate in the loop, so the batch's time counts
        batch = next(batches)
        with accelerator.accumulate(model):
            loss = loss_of(batch)
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        loss.item()
        if step >= warm_up:
            times.append(time.perf_counter() - began)
            tokens.append(int(batch["attention_mask"].sum()))
    speeds = [number / seconds for number, seconds in zip(tokens, times, strict=True)]
    print(json.dumps({"tokens_per_second": statistics.median(speeds), "step_seconds": statistics.median(times)}))
