"""The loss falls as in Hugging Face's causal-LM example, step by step, on the same blocks in the same order."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, get_scheduler, set_seed

from benchmarks.example_step import adamw
from causal import OVERRIDES, causal_run, plain_blocks, plain_perplexity
from common.data.batches import NextToken, TrainBatches
from pretraining import losses, results

STEPS, BATCH, SEED = 30, 4, 42
EXAMPLE = ["--weight_decay", 0, "--max_grad_norm", 0, "--lr_scheduler_type", "linear"]


def texts_of(file):
    """The lines of a file, stripped, without empty ones."""
    return [text for line in file.read_text(encoding="utf-8").split("\n") if (text := line.strip())]


def plain_losses(config, blocks, learning_rate):
    """The example's calls: stock model, all logits, its AdamW, transformers' linear schedule, nothing clipped."""
    set_seed(SEED)
    model = AutoModelForCausalLM.from_config(config).train()
    optimizer = adamw(model, learning_rate, ("bias", "layer_norm.weight"))
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=STEPS)
    order = TrainBatches(blocks, NextToken(), SEED, BATCH, 1, rank=0, ranks=1, device=torch.device("cpu"))
    _, rows = order.locate(np.arange(STEPS * BATCH))
    found = []
    for batch in blocks[rows].split(BATCH):
        loss = model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def compare(harness, train, held_out, cache, out, *flags, learning_rate, least_fall):
    words = [*EXAMPLE, "--learning_rate", learning_rate, "--validation_file", held_out, *flags]
    overrides = f"{OVERRIDES},dropout=0.0"
    harness.run(*causal_run(train, cache, out, *words, steps=STEPS, batch=BATCH, overrides=overrides)).check()
    blocks = plain_blocks(texts_of(train), AutoTokenizer.from_pretrained(out))
    assert len(blocks) < STEPS * BATCH  # so that there is a second epoch
    mine, theirs = losses(out), plain_losses(AutoConfig.from_pretrained(out), blocks, learning_rate)
    differences = [abs(mine[step] - loss) for step, loss in enumerate(theirs, start=1)]
    perplexity, expected = results(out)["perplexity"], plain_perplexity(out, texts_of(held_out))
    print(f"loss {theirs[0]:.4f} to {theirs[-1]:.4f}, largest difference {max(differences):.1e}")
    print(f"perplexity {perplexity:.4f}, by stock transformers {expected:.4f}")
    assert len(mine) == STEPS and max(differences) < 1e-3
    assert np.mean(theirs[:5]) - np.mean(theirs[-5:]) > least_fall
    assert perplexity == pytest.approx(expected, rel=1e-4)


def first_lines(source, number, path):
    """Write the first lines of a file. Returns: path."""
    with source.open(encoding="utf-8") as lines:
        path.write_text("".join(line for line, _ in zip(lines, range(number), strict=False)), encoding="utf-8")
    return path


def test_as_the_example_on_tiny_corpus(harness, tiny_corpus, tmp_path, out):
    """With a learning rate at which the loss falls far in as many steps."""
    lines = tiny_corpus.read_text().splitlines(keepends=True)
    train, held_out = tmp_path / "train.txt", tmp_path / "held_out.txt"
    train.write_text("".join(lines[:50]))
    held_out.write_text("\n".join(lines[50:80]))  # with empty lines
    compare(harness, train, held_out, tmp_path / "cache", out, learning_rate=3e-3, least_fall=0.5)


@pytest.mark.slow
def test_as_the_example_on_wikitext(harness, data_folder, tmp_path, out):
    train = first_lines(data_folder / "wikitext-2" / "train.txt", 90, tmp_path / "train.txt")
    held_out = first_lines(data_folder / "wikitext-2" / "test.txt", 100, tmp_path / "held_out.txt")
    tokenizer = ["--tokenizer_name", data_folder / "vocab" / "opt"]
    compare(harness, train, held_out, tmp_path / "cache", out, *tokenizer, learning_rate=5e-5, least_fall=0.003)
