"""The training step of Hugging Face's causal-LM example without a trainer, to compare with: stock OPT with random
weights, stock collator, full-vocabulary logits, AdamW without fusion, no clipping, fp32.

    python -m benchmarks.clm_example --train_file text.txt --tokenizer_name folder --model_size 125m --block_size 128

The last line printed is a JSON object: tokens_per_second (the median over the steps), step_seconds.
Source of the recipe: examples/pytorch/language-modeling/run_clm_no_trainer.py of transformers, with its defaults.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import GPT2Tokenizer, OPTConfig, OPTForCausalLM, default_data_collator, get_scheduler

from benchmarks.example_step import adamw, cut_into_rows, print_speed
from common.models.presets import opt_shape


def parse():
    """The command line; defaults are the example's, but for the number of steps."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--tokenizer_name", required=True, help="Folder with OPT's vocab.json and merges.txt.")
    parser.add_argument("--cache_dir", default=None, help="Where datasets keeps what it has prepared.")
    parser.add_argument("--model_size", default="125m")
    parser.add_argument("--block_size", type=int, default=1024)
    parser.add_argument("--per_device_train_batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--warm_up", type=int, default=1, help="Steps that are not timed.")
    return parser.parse_args()


def load_opt_tokenizer(folder):
    """OPT's tokenizer of its two files, with the special tokens that its hub folder names."""
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>")
    return GPT2Tokenizer.from_pretrained(folder, **special, pad_token="<pad>", add_bos_token=True)


def rows(args, tokenizer):
    """The example's data: a datasets.Dataset of rows."""
    file = str(Path(args.train_file).resolve())
    raw = load_dataset("text", data_files=file, cache_dir=args.cache_dir, keep_linebreaks=True)["train"]
    texts = raw.map(lambda examples: tokenizer(examples["text"]), batched=True, remove_columns=["text"])
    blocks = cut_into_rows(texts, args.block_size)
    return blocks.map(lambda columns: {"labels": columns["input_ids"]}, batched=True)


def main():
    """Train a few steps and print their speed."""
    args = parse()
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    model = OPTForCausalLM(OPTConfig(**opt_shape(args.model_size)))
    loader = DataLoader(
        rows(args, load_opt_tokenizer(args.tokenizer_name)),
        shuffle=True,
        collate_fn=default_data_collator,
        batch_size=args.per_device_train_batch_size,
    )
    optimizer = adamw(model, args.learning_rate, ("bias", "layer_norm.weight"))
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=3 * len(loader))  # 3 epochs
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    losses = lambda batch: model(**batch).loss  # noqa: E731
    print_speed(accelerator, model, optimizer, loader, schedule, losses, args.warm_up, args.steps)


if __name__ == "__main__":
    main()
