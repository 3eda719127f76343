"""A small pretraining run for the tests: its flags, and how two runs are compared."""

import json
import time

from safetensors.torch import load_file

from common.report import read_metrics
from harness import REPOSITORY

SCRIPT = "run_pretraining.py"
MODEL = ["--num_hidden_layers", 2, "--hidden_size", 32, "--num_attention_heads", 2, "--intermediate_size", 64]
SMALL = [*MODEL, "--max_seq_length", 64, "--max_eval_samples", 32, "--fp32", "--logging_steps", 1]
SMALL += ["--attn_implementation", "sdpa"]  # two runs would otherwise measure, and might choose differently

# ExtremeBERT's README, "best configuration presented in our paper", without --fp16 (a CPU cannot) where it is run
EXTREMEBERT = """
  --model_type bert-mlm --tokenizer_name {tokenizer} --hidden_act gelu --hidden_size 1024 --num_hidden_layers 24
  --num_attention_heads 16 --intermediate_size 4096 --hidden_dropout_prob 0.1 --attention_probs_dropout_prob 0.1
  --encoder_ln_mode pre-ln --lr 1e-3 --train_batch_size 4096 --train_micro_batch_size_per_gpu 32 --lr_schedule time
  --curve linear --warmup_proportion 0.06 --gradient_clipping 0.0 --optimizer_type adamw --weight_decay 0.01
  --adam_beta1 0.9 --adam_beta2 0.98 --adam_eps 1e-6 --total_training_time 24.0 --early_exit_time_marker 24.0
  --dataset_path {dataset} --output_dir {output} --print_steps 100 --num_epochs_between_checkpoints 10000
  --job_name pretraining_experiment --project_name budget-bert-pretraining --validation_epochs 3
  --validation_epochs_begin 1 --validation_epochs_end 1 --validation_begin_proportion 0.05
  --validation_end_proportion 0.01 --validation_micro_batch 16 --deepspeed --data_loader_type dist --do_validation
  --use_early_stopping --early_stop_time 180 --early_stop_eval_loss 6 --seed 42
"""

# BERT large's configuration as it was published, which PipeDream's --bert_config_path names
BERT_CONFIG = {
    "attention_probs_dropout_prob": 0.1,
    "directionality": "bidi",
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "max_position_embeddings": 512,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "pooler_fc_size": 768,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}


def small_run(corpus, cache, out, *flags, steps=None, batch=8):
    """The command line, without the program's name, of a run of a tiny model on a text file."""
    data = ["--train_file", corpus, "--cache_dir", cache, "--tokenizer_train_vocab_size", 600]
    limit = ["--max_train_steps", steps] if steps else []
    return [SCRIPT, *SMALL, *data, *limit, "--train_batch_size", batch, "--output_dir", out, *flags]


def fp32_copy(config, folder):
    """A user's copy of a YAML, in fp32. Returns: its Path."""
    text = (REPOSITORY / config).read_text()
    assert "mixed_precision: bf16" in text
    copy = folder / "fp32.yaml"
    copy.write_text(text.replace("mixed_precision: bf16", "mixed_precision: 'no'"))
    return copy


def training_rows(out):
    """The rows of metrics.jsonl that come from training, without what depends on the machine's speed."""
    timed = ("hours", "tokens_per_second", "mfu", "data_wait_share", "peak_memory_bytes")
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


def wait_for_step(process, out, step, timeout=120):
    """Wait until a running process has logged this step; fail the test if it ends or hangs before."""
    deadline = time.monotonic() + timeout
    while not (out / "metrics.jsonl").exists() or max(losses(out), default=0) < step:
        assert process.poll() is None, f"it ended before step {step}\n{process.tail()}"
        assert time.monotonic() < deadline, f"step {step} was not reached\n{process.tail()}"
        time.sleep(0.01)


def losses(out):
    """Training losses by step."""
    return {row["step"]: row["loss"] for row in training_rows(out)}


def results(out):
    """all_results.json."""
    return json.loads((out / "all_results.json").read_text())


def weights(out):
    """The saved weights by name."""
    return load_file(out / "model.safetensors")


def assert_same_run(left, right):
    """Two runs did the same, bit for bit: every logged loss, gradient norm, rate and count, and the final weights."""
    assert training_rows(left) == training_rows(right)
    mine, yours = weights(left), weights(right)
    assert mine.keys() == yours.keys()
    assert all(mine[name].equal(yours[name]) for name in mine)
    same = ("eval_loss", "eval_accuracy", "train_steps", "train_tokens", "epoch")
    assert {name: results(left)[name] for name in same} == {name: results(right)[name] for name in same}
