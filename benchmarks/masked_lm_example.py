"""The training step of Hugging Face's masked-language-modelling example, to compare with: stock model, stock collator,
full-vocabulary logits, AdamW without fusion, dropout 0.1, fp32.

    python -m benchmarks.masked_lm_example --train_file text.txt --tokenizer_name vocab.txt --model_size mini

Its features can be replaced one by one, for the ablation. The last line printed is a JSON object: tokens_per_second
(real tokens, the median over the steps), step_seconds.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling, get_scheduler

from benchmarks.example_step import adamw, cut_into_rows, print_speed
from common.data.tokenizers import load_tokenizer
from common.models.presets import model_shape


def parse():
    """The command line; defaults are the example's, but for the number of steps."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--tokenizer_name", required=True)
    parser.add_argument("--cache_dir", default=None, help="Where datasets keeps what it has prepared.")
    parser.add_argument("--model_size", default="mini")
    parser.add_argument("--max_seq_length", type=int, default=128)
    parser.add_argument("--per_device_train_batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--line_by_line", action="store_true", help="A line is a row.")
    parser.add_argument("--pad_to_max_length", action="store_true", help="Pad lines to the length of a row.")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm_up", type=int, default=2, help="Steps that are not timed.")
    parser.add_argument("--masked_head", action="store_true", help="Logits of the masked positions only.")
    parser.add_argument("--no_dropout", action="store_true")
    parser.add_argument("--fused_adamw", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    return parser.parse_args()


def rows(args, tokenizer):
    """The example's data: a datasets.Dataset of rows."""
    raw = load_dataset("text", data_files=str(Path(args.train_file).resolve()), cache_dir=args.cache_dir)["train"]
    if args.line_by_line:
        raw = raw.filter(lambda example: example["text"] and not example["text"].isspace())
        padding = "max_length" if args.pad_to_max_length else False

        def tokenize(examples):
            return tokenizer(
                examples["text"],
                padding=padding,
                truncation=True,
                max_length=args.max_seq_length,
                return_special_tokens_mask=True,
            )

        return raw.map(tokenize, batched=True, remove_columns=["text"])
    texts = raw.map(
        lambda examples: tokenizer(examples["text"], return_special_tokens_mask=True),
        batched=True,
        remove_columns=["text"],
    )
    return cut_into_rows(texts, args.max_seq_length)


def loss_of(model, batch, masked_head):
    """The example's loss; with masked_head, the same number from the logits of the masked positions alone."""
    if not masked_head:
        return model(**batch).loss
    labels = batch.pop("labels")
    hidden = model.bert(**batch)[0]
    masked = labels != -100
    return F.cross_entropy(model.cls(hidden[masked]).float(), labels[masked])


def main():
    """Train a few steps and print their speed."""
    args = parse()
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if args.bf16 else "no")
    tokenizer = load_tokenizer(args.tokenizer_name)
    config = BertConfig(vocab_size=len(tokenizer), **model_shape(args.model_size))
    if args.no_dropout:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = BertForMaskedLM(config)
    loader = DataLoader(
        rows(args, tokenizer),
        shuffle=True,
        collate_fn=DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=0.15),
        batch_size=args.per_device_train_batch_size,
    )
    not_decayed = ("bias", "LayerNorm.weight")
    optimizer = adamw(model, args.learning_rate, not_decayed, fused=True if args.fused_adamw else None)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=len(loader))
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    losses = lambda batch: loss_of(model, batch, args.masked_head)  # noqa: E731
    print_speed(accelerator, model, optimizer, loader, schedule, losses, args.warm_up, args.steps)


if __name__ == "__main__":
    main()
