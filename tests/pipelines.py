"""What the tests of pipelines share: user's copies of the YAMLs, and runs under them."""

import re
import signal

import torch

from causal import OVERRIDES, causal_run
from common.checkpoint import latest_checkpoint
from pretraining import fp32_copy, small_run, wait_for_step

LAYERS = 4
LIMIT = 0.2  # of the gradient's norm, which is larger in every step
FLAGS = ["--per_device_train_batch_size", 16, "--learning_rate", 3e-3, "--optimizer_type", "adamw"]
FLAGS += ["--max_grad_norm", LIMIT]
SCRIPTS = {"opt": "run_clm.py"}  # others: run_pretraining.py


def copy_of(name, folder, **options):
    """A user's copy of a YAML, in fp32 and with other options in its role. Returns: its Path."""
    copy = fp32_copy(f"accelerate_configs/{name}.yaml", folder)
    text = copy.read_text()
    for option, value in options.items():
        text, found = re.subn(rf"\b{option}=\w+", f"{option}={value}", text)
        assert found
    copy.write_text(text)
    return copy


def launch(harness, words, config, processes=None):
    """Run the ranks of a YAML to their end, which must be a good one. Returns: what rank 0 has printed."""
    ranks = harness.launch(*words, config=config, num_processes=processes)
    printed = [rank.check().stdout for rank in ranks]
    assert not any(printed[1:])
    return printed[0]


def command(model, corpus, cache, out, *flags, steps=10, dropout=0.0, layers=LAYERS):
    """Steps of 16 rows of a model of a few layers, clipping active; a device takes all rows at once."""
    flags = [*FLAGS, *flags]
    if model == "opt":
        overrides = OVERRIDES.replace("num_hidden_layers=2", f"num_hidden_layers={layers}")
        overrides += f",dropout={dropout},attention_dropout={dropout}"
        return causal_run(corpus, cache, out, *flags, steps=steps, batch=16, overrides=overrides)
    flags += ["--model_type", model, "--num_hidden_layers", layers]
    flags += ["--hidden_dropout_prob", dropout, "--attention_probs_dropout_prob", dropout]
    return small_run(corpus, cache, out, *flags, steps=steps, batch=16)


def kill_and_continue(harness, words, out, config):
    """Kill all ranks of a run after step 7, and continue it from its last checkpoint."""
    processes = harness.start_ranks(*words, config=config, num_processes=None, pause_at=7)
    wait_for_step(processes[0], out, 7)
    for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped, none of them sees another die and ends by itself
        for process in processes:
            process.signal(number)
    assert {process.wait().returncode for process in processes} == {-9}
    assert latest_checkpoint(out).name in ("step_6", "step_9", "step_12", "step_15", "step_18")
    launch(harness, [*words, "--resume_from_checkpoint", "latest"], config)


def assert_copies_are_equal(checkpoint, *keys):
    """First and last stage hold the same of the tied embedding, bit for bit, in these parts of their states."""
    first, *_, last = [torch.load(path, weights_only=True) for path in sorted(checkpoint.glob("optimizer-*.pt"))]
    for key in keys:
        (shared,) = first[key].keys() & last[key].keys()
        mine, theirs = first[key][shared], last[key][shared]
        pairs = [(mine, theirs)] if torch.is_tensor(mine) else [(mine[name], theirs[name]) for name in mine]
        assert shared.endswith("word_embeddings.weight") and all(one.equal(other) for one, other in pairs)
