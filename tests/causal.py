"""A small causal run for the tests: its flags; runs are compared as those of pretraining.py."""

SHAPE = "hidden_size=32,word_embed_proj_dim=32,num_hidden_layers=2,num_attention_heads=2,ffn_dim=64"
OVERRIDES = f"{SHAPE},max_position_embeddings=128"
BLOCK = 64


def causal_run(corpus, cache, out, *flags, steps=None, batch=8, overrides=OVERRIDES):
    """The command line, without the program's name, of a run of a tiny OPT on a text file."""
    data = ["--train_file", corpus, "--cache_dir", cache, "--tokenizer_train_vocab_size", 600, "--block_size", BLOCK]
    model = [] if overrides is None else ["--config_overrides", overrides]
    limit = ["--max_train_steps", steps] if steps else []
    common = ["--fp32", "--logging_steps", 1, "--train_batch_size", batch, "--output_dir", out]
    return ["run_clm.py", *model, *data, *limit, *common, *flags]
