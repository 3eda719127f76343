"""The training step of Hugging Face's GLUE example without a trainer, to compare with: stock model, rows padded to one
length, AdamW without fusion, no clipping, fp32.

    python -m benchmarks.glue_example --model folder --tokenizer_name vocab.txt --task_name mrpc --data_dir glue_data

The last line printed is a JSON object: examples_per_second, tokens_per_second (real tokens).
"""

import argparse
import json
import time

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    default_data_collator,
    get_scheduler,
)

from benchmarks.example_step import adamw
from common.data.glue import find_task, read_task_file, task_folder
from common.data.tokenizers import load_tokenizer


def parse():
    """The command line; defaults are the example's, but for batch and steps."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="Folder with a config.json; the weights are random.")
    parser.add_argument("--tokenizer_name", required=True)
    parser.add_argument("--task_name", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--pad_to_max_length", action="store_true", help="In place of a batch's longest row.")
    parser.add_argument("--per_device_train_batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warm_up", type=int, default=1, help="Steps that are not timed.")
    return parser.parse_args()


def main():
    """Train a few steps and print their speed."""
    args = parse()
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    task, tokenizer = find_task(args.task_name), load_tokenizer(args.tokenizer_name)
    config = AutoConfig.from_pretrained(args.model, num_labels=task.num_labels)
    model = AutoModelForSequenceClassification.from_config(config)
    examples = read_task_file(task, task_folder(task, args.data_dir) / "train.tsv", labelled=True)
    texts = zip(*(example.texts for example in examples), strict=True)
    rows = Dataset.from_dict({f"sentence{number}": list(column) for number, column in enumerate(texts, start=1)})
    rows = rows.add_column("labels", [example.label for example in examples])
    padding = "max_length" if args.pad_to_max_length else False

    def tokenize(batch):
        columns = [batch[name] for name in batch if name.startswith("sentence")]
        encoded = tokenizer(*columns, padding=padding, max_length=args.max_length, truncation=True)
        return {**encoded, "labels": batch["labels"]}

    rows = rows.map(tokenize, batched=True, remove_columns=rows.column_names)
    collate = default_data_collator if args.pad_to_max_length else DataCollatorWithPadding(tokenizer)
    loader = DataLoader(rows, shuffle=True, collate_fn=collate, batch_size=args.per_device_train_batch_size)
    optimizer = adamw(model, args.learning_rate, ("bias", "LayerNorm.weight"))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=3 * len(loader))
    model.train()
    seconds = tokens = 0
    batches = iter(loader)
    for step in range(args.warm_up + args.steps):
        began = time.perf_counter()  # the example collates in the loop, so the batch's time counts
        batch = next(batches)
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss.item()
        if step >= args.warm_up:
            seconds += time.perf_counter() - began
            tokens += int(batch["attention_mask"].sum())
    examples = args.steps * args.per_device_train_batch_size
    print(json.dumps({"examples_per_second": examples / seconds, "tokens_per_second": tokens / seconds}))


if __name__ == "__main__":
    main()
