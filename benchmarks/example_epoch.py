"""The Hugging Face masked-language-model example's recipe, as the baseline of benchmarks; in pieces, if wanted.

    python -m benchmarks.example_epoch --learning_rate 5e-5 --seconds 200

trains bert-mini for one epoch of WikiText-2 and prints one JSON object. With --seconds it stops then, its state is in
--work, and the same command goes on. A step is computed as the example does it (--in_full), or by the same arithmetic
in less time: run_pretraining.py's forward pass, and AdamW in one kernel. --check N runs both for N steps without
dropout and prints their losses, which must agree.

Source of the recipe: examples/pytorch/language-modeling/run_mlm_no_trainer.py of transformers, with its defaults.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast, DataCollatorForLanguageModeling

from benchmarks.interleaved import REPOSITORY
from common.models.families import FAMILIES
from common.models.layers import make_fast, use_attention

DATA = os.environ.get("FRUGAL_TEST_DATA", REPOSITORY.parent / "shared" / "data")
WORK = REPOSITORY / "runs" / "cache" / "benchmarks"
SEQUENCE, BATCH, PROBABILITY, DROPOUT = 128, 8, 0.15, 0.1
MINI = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
EVAL_ROWS, EVAL_SEED = 512, 1234


def load_tokenizer(data):
    """The tokenizer of --data's vocab/bert-base-uncased."""
    return BertTokenizerFast(str(Path(data) / "vocab/bert-base-uncased/vocab.txt"), do_lower_case=True)


def load_rows(data, part, tokenizer):
    """WikiText-2 as the example cuts it: every line between [CLS] and [SEP], one stream, the tail dropped.

    Args:
        data: folder that holds wikitext-2; part: "train" or "valid".
    Returns:
        [R, SEQUENCE] int64.
    """
    lines = (Path(data) / "wikitext-2" / f"{part}.txt").read_text(encoding="utf-8").splitlines()
    stream = np.concatenate([np.asarray(ids, np.int64) for ids in tokenizer(lines)["input_ids"]])
    return stream[: len(stream) // SEQUENCE * SEQUENCE].reshape(-1, SEQUENCE)


def stock_model(tokenizer, seed, dropout):
    """bert-mini with stock initial weights."""
    torch.manual_seed(seed)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **MINI, **rates))


class Evaluation:
    """Loss of a stock model on one fixed set of masked held-out batches.

    Args:
        data: folder that holds wikitext-2; tokenizer: of load_tokenizer.
    """

    def __init__(self, data, tokenizer):
        rows = load_rows(data, "valid", tokenizer)
        chosen = rows[np.linspace(0, len(rows) - 1, EVAL_ROWS).astype(int)]
        torch.manual_seed(EVAL_SEED)
        self.batches = collated(chosen, tokenizer, batch=8)

    def __call__(self, model, masked_only=False):
        """Mean loss over the masked positions, in nats; masked_only computes the same without the other logits."""
        training, total, count = model.training, 0.0, 0
        model.eval()
        with torch.no_grad():
            for batch in self.batches:
                number = int((batch["labels"] != -100).sum())
                loss = masked_loss(model, batch) if masked_only else model(**batch).loss
                total, count = total + loss.item() * number, count + number
        model.train(training)
        return total / count


def collated(rows, tokenizer, batch):
    """Rows masked by the stock collator, as a list of batches."""
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=PROBABILITY)
    special = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    items = [{"input_ids": row, "special_tokens_mask": np.isin(row, special).astype(np.int64)} for row in rows]
    return [collate(items[i : i + batch]) for i in range(0, len(items), batch)]


def masked_loss(model, batch):
    """The stock loss with logits for the masked positions only."""
    chosen = batch["labels"] != -100
    hidden = model.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    return F.cross_entropy(model.cls(hidden[chosen]), batch["labels"][chosen])


def as_ours(batch):
    """A batch of the stock collator as run_pretraining.py's model takes it; what is not masked has weight 0."""
    labels = batch["labels"]
    masked = labels != -100
    most = int(masked.sum(dim=1).max())
    positions = masked.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    weights = masked.gather(1, positions).float()
    rows, length = labels.shape
    return {
        "input_ids": batch["input_ids"],
        "position_ids": torch.arange(length).expand(rows, -1),
        "document_ids": torch.ones(rows, length, dtype=torch.long),
        "masked_positions": positions,
        "masked_labels": labels.gather(1, positions).clamp(min=0),
        "masked_weights": weights,
        "loss_denominator": weights.sum(),
    }


class Example:
    """The example's training run over one epoch; step n draws its masks and dropout from (seed, n) alone.

    Args:
        rows: of load_rows; tokenizer: of load_tokenizer.
        learning_rate: at the start; it falls in a straight line to 0 at the end of the epoch.
        in_full: compute each step as the example does.
        dropout, seed: as named.
    """

    def __init__(self, rows, tokenizer, learning_rate, in_full=False, dropout=DROPOUT, seed=0):
        self.rows, self.tokenizer, self.seed, self.in_full = rows, tokenizer, seed, in_full
        self.learning_rate = learning_rate
        self.model = stock_model(tokenizer, seed, dropout).train()
        if not in_full:
            self.model.__class__ = FAMILIES["bert"].model
            self.model.packs_documents = False
            make_fast(self.model)
            use_attention(self.model, "sdpa")
        kernel = {"foreach": False, "fused": False} if in_full else {"fused": True}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=learning_rate, weight_decay=0.0, **kernel)
        self.order = np.random.default_rng(seed).permutation(len(rows))
        self.total_steps = -(-len(rows) // BATCH)
        self.completed = 0

    def step(self):
        """One optimizer step. Returns: its loss."""
        torch.manual_seed(self.seed * 1_000_003 + self.completed)
        here = self.order[self.completed * BATCH : (self.completed + 1) * BATCH]
        (batch,) = collated(self.rows[here], self.tokenizer, BATCH)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * (1 - self.completed / self.total_steps)
        loss = self.model(**(batch if self.in_full else as_ours(batch))).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.completed += 1
        return loss.item()

    def save(self, path):
        """Write the state, whole or not at all."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.completed}
        torch.save(state, path.with_suffix(".writing"))
        path.with_suffix(".writing").replace(path)

    def load(self, path):
        """Go on from a saved state."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.completed = state["step"]


def check(rows, tokenizer, learning_rate, steps):
    """Both ways to compute a step, without dropout, side by side."""
    ways = [Example(rows, tokenizer, learning_rate, in_full, dropout=0.0) for in_full in (True, False)]
    losses = [[way.step() for way in ways] for _ in range(steps)]
    return {"losses": losses, "largest_difference": max(abs(a - b) for a, b in losses)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=DATA, help="folder that holds wikitext-2 and vocab")
    parser.add_argument("--work", type=Path, default=WORK / "example", help="folder for saved states")
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long, to be continued")
    parser.add_argument("--steps", type=int, help="stop at this step")
    parser.add_argument("--in_full", action="store_true", help="full logits and AdamW in a loop, as the example")
    parser.add_argument("--check", type=int, metavar="N", help="compare both ways over N steps without dropout")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.data)
    rows = load_rows(args.data, "train", tokenizer)
    if args.check:
        print(json.dumps(check(rows, tokenizer, args.learning_rate, args.check)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / f"example-lr{args.learning_rate:g}.pt"
    run = Example(rows, tokenizer, args.learning_rate, args.in_full)
    if path.exists():
        run.load(path)
    last = min(run.total_steps, args.steps or run.total_steps)
    began, losses, first = time.perf_counter(), [], run.completed
    while run.completed < last and time.perf_counter() - began < args.seconds:
        losses.append(run.step())
    spent = time.perf_counter() - began
    run.save(path)
    result = {"learning_rate": args.learning_rate, "step": run.completed, "of": run.total_steps}
    result |= {"tokens": rows.size, "seconds_per_step": spent / max(1, run.completed - first), "in_full": args.in_full}
    result["recent_train_loss"] = float(np.mean(losses[-100:])) if losses else None
    if run.completed >= last:
        stock = stock_model(tokenizer, 0, DROPOUT)
        stock.load_state_dict(run.model.state_dict())
        result["eval_loss"] = Evaluation(args.data, tokenizer)(stock)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
