"""The loss falls as the plain recipe's does: stock BertForMaskedLM, stock collator, rows cut from one stream."""

import math
import random

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    get_scheduler,
    set_seed,
)

from common.data.batches import Masking, TrainBatches
from common.data.packing import Frame, build_rows
from common.data.token_files import TokenFile
from pretraining import MODEL, SCRIPT, training_rows

S, BATCH, RATE = 64, 4, 3e-3
BOUND = 0.02


def plain_rows(token_file, tokenizer):
    """The example's group_texts over whole documents with special tokens; the tail is dropped."""
    stream = []
    for start, length in zip(token_file.starts, token_file.lengths, strict=True):
        text = token_file.tokens[start : start + length].tolist()
        stream += [tokenizer.cls_token_id, *text, tokenizer.sep_token_id]
    return [{"input_ids": stream[i : i + S]} for i in range(0, len(stream) - S + 1, S)]


def plain_training(rows, tokenizer, vocab_size, steps, seed=0):
    """The example's loop: full-vocabulary logits, random masks, fp32, clipping at 1, linear warm-up and decay."""
    torch.manual_seed(seed)
    shape = dict(zip([str(word)[2:] for word in MODEL[::2]], MODEL[1::2], strict=True))
    config = BertConfig(
        vocab_size=vocab_size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0, **shape
    )
    model = BertForMaskedLM(config).train()
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6)
    warmup = 0.06 * steps
    order = random.Random(seed).sample(range(len(rows)), len(rows)) * (steps * BATCH // len(rows) + 1)
    losses = []
    for step in range(steps):
        factor = step / warmup if step < warmup else (steps - step) / (steps - warmup)
        for group in optimizer.param_groups:
            group["lr"] = RATE * factor
        batch = collate([rows[i] for i in order[step * BATCH : (step + 1) * BATCH]])
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def stock_loss(model, rows, tokenizer):
    """Loss on one fixed set of masked batches."""
    torch.manual_seed(1234)
    batch = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)(rows[:160])
    with torch.no_grad():
        return model.eval()(**batch).loss.item()


def compare(harness, cache, out, steps, *data_flags):
    flags = [*MODEL, *data_flags, "--cache_dir", cache, "--output_dir", out, "--max_seq_length", S, "--fp32"]
    flags += ["--train_batch_size", BATCH, "--max_train_steps", steps, "--learning_rate", RATE]
    flags += ["--packing", "concat", "--init_output_bias", "zeros", "--logging_steps", 1, "--max_eval_samples", 32]
    flags += ["--mlm_probability", 0.15, "--optimizer_type", "adamw"]
    harness.run(SCRIPT, *flags).check()
    ours, tokenizer = AutoModelForMaskedLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    prepared = next(path.parent for path in cache.glob("*/train.bin"))
    train, held_out = (plain_rows(TokenFile(prepared / part), tokenizer) for part in ("train", "validation"))
    plain, losses = plain_training(train, tokenizer, ours.config.vocab_size, steps)
    start = math.log(ours.config.vocab_size)
    mine, theirs = stock_loss(ours, held_out, tokenizer), stock_loss(plain, held_out, tokenizer)
    print(f"held-out loss by stock transformers: ours {mine:.4f}, the plain recipe's {theirs:.4f}")
    assert theirs < start - 1 and mine == pytest.approx(theirs, rel=BOUND)
    return losses


def test_as_the_plain_recipe_on_the_embedded_corpus(harness, tmp_path, out):
    data = ["--max_train_documents", 1500, "--tokenizer_train_vocab_size", 2000, "--validation_split_percentage", 20]
    losses = compare(harness, tmp_path / "cache", out, 240, *data)
    ours = [row["loss"] for row in training_rows(out)]
    for part in range(3):  # along the way, too
        middle = slice(80 * part, 80 * (part + 1))
        assert np.mean(ours[middle]) == pytest.approx(np.mean(losses[middle]), rel=BOUND)


def test_as_the_plain_recipe_on_wikitext(harness, data_folder, tmp_path, out):
    vocabulary = data_folder / "vocab/bert-base-uncased/vocab.txt"
    data = ["--train_file", data_folder / "wikitext-2/train.txt", "--tokenizer_name", vocabulary]
    data += ["--validation_file", data_folder / "wikitext-2/valid.txt", "--max_train_documents", 6000]
    compare(harness, tmp_path / "cache", out, 200, *data)


def examples_losses(batches, vocab_size, steps, **settings):
    """The example's own calls: stock model, labels of -100, AdamW, transformers' linear schedule."""
    set_seed(42)
    shape = dict(zip([str(word)[2:] for word in MODEL[::2]], MODEL[1::2], strict=True))
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForMaskedLM(BertConfig(vocab_size=vocab_size, **shape, **dropout)).train()
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    losses = []
    for (batch, _, _), _ in zip(batches, range(steps), strict=False):
        labels = torch.full_like(batch["input_ids"], -100)
        labels.scatter_(1, batch["masked_positions"], batch["masked_labels"])
        loss = model(input_ids=batch["input_ids"], labels=labels).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("flags", "settings"), [([], {"lr": 5e-5}), (["--learning_rate", RATE], {"lr": RATE})])
def test_parity_hf_is_the_examples_recipe(harness, tiny_corpus, tmp_path, out, flags, settings):
    """Fed the same masked rows and without dropout, it takes the same steps."""
    cache, steps, dropout = tmp_path / "cache", 40, ["--hidden_dropout_prob", 0, "--attention_probs_dropout_prob", 0]
    words = [*MODEL, "--train_file", tiny_corpus, "--tokenizer_train_vocab_size", 600, "--cache_dir", cache, "--fp32"]
    words += ["--max_seq_length", S, "--max_train_steps", steps, "--output_dir", out, "--logging_steps", 1]
    harness.run(SCRIPT, "--parity", "hf", *words, *dropout, *flags).check()
    ours, tokenizer = AutoModelForMaskedLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    prepared = next(path.parent for path in cache.glob("*/train.bin"))
    rows = build_rows(TokenFile(prepared / "train"), Frame.for_masked(tokenizer), S, "concat", out / "rows")
    masking = Masking.for_tokenizer(tokenizer, 0.15)
    batches = TrainBatches(rows, masking, 42, 8, 1, rank=0, ranks=1, device=torch.device("cpu"))
    defaults = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    theirs = examples_losses(batches, ours.config.vocab_size, steps, **defaults, **settings)
    mine = [row["loss"] for row in training_rows(out)]
    assert mine == pytest.approx(theirs, abs=1e-5) and np.mean(mine[-5:]) < np.mean(mine[:5])
