"""A small causal run for the tests: its flags; runs are compared as those of pretraining.py."""

import math

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SHAPE = "hidden_size=32,word_embed_proj_dim=32,num_hidden_layers=2,num_attention_heads=2,ffn_dim=64"
OVERRIDES = f"{SHAPE},max_position_embeddings=128"
BLOCK = 64


def causal_run(corpus, cache, out, *flags, steps=None, batch=8, overrides=OVERRIDES):
    """The command line, without the program's name, of a run of a tiny OPT on a text file."""
    data = ["--train_file", corpus, "--cache_dir", cache, "--tokenizer_train_vocab_size", 600, "--block_size", BLOCK]
    model = [] if overrides is None else ["--config_overrides", overrides]
    limit = ["--max_train_steps", steps] if steps else []
    common = ["--fp32", "--logging_steps", 1, "--train_batch_size", batch, "--output_dir", out]
    common += ["--max_eval_samples", 100_000]
    return ["run_clm.py", *model, *data, *limit, *common, *flags]


def plain_blocks(texts, tokenizer):
    """[R, BLOCK]: texts with their special tokens, one stream, cut; what is left at the end is dropped."""
    stream = [token for text in texts for token in tokenizer(text)["input_ids"]]
    return torch.tensor(stream[: len(stream) // BLOCK * BLOCK]).view(-1, BLOCK)


def plain_perplexity(out, texts):
    """Perplexity of a saved model over texts, over all predicted tokens, with stock transformers alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    blocks = plain_blocks(texts, tokenizer)
    with torch.no_grad():
        sums = [model(part, labels=part).loss.double() * part[:, 1:].numel() for part in blocks.split(16)]
    return math.exp(sum(sums) / blocks[:, 1:].numel())


def opt_parameters(layers, hidden, vocabulary=50272, positions=2050, words=None, last_norm=True):
    """By hand: words and positions; four projections, two feed-forward matrices, two norms a layer; the last norm."""
    layer = 4 * (hidden * hidden + hidden) + (4 * hidden * hidden + 4 * hidden) + (4 * hidden * hidden + hidden)
    layer += 4 * hidden
    outside = vocabulary * (words or hidden) + positions * hidden + last_norm * 2 * hidden
    return outside + 2 * (words or 0) * hidden + layers * layer
