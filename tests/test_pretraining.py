"""The main job on a small model: it learns, its files can be used, its numbers agree with stock transformers."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from common.data.batches import EvalBatches, Masking
from common.data.packing import ConcatenatedRows, DocumentRows, Frame
from common.data.token_files import TokenFile
from common.report import read_metrics
from harness import REPOSITORY
from pretraining import EXTREMEBERT, SCRIPT, losses, results, small_run, training_rows, weights


@pytest.fixture(scope="module")
def finished(harness, tiny_corpus, cache, tmp_path_factory):
    """A run of 300 steps, its folder and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    flags = ["--learning_rate", 3e-3, "--eval_steps", 100, "--checkpointing_steps", 120]
    result = harness.run(*small_run(tiny_corpus, cache, out, *flags, steps=300, batch=16)).check()
    return SimpleNamespace(out=out, stdout=result.stdout, stderr=result.stderr)


def prepared(stdout):
    """The folder of the prepared data, as the screen says it."""
    return Path(re.search(r"prepared data *(.*)", stdout)[1])


def stock_evaluation(out, rows_of, folder, batch_size=8):
    """Loss and accuracy of the saved model, computed with stock transformers, document by document, no packing."""
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    token_file = TokenFile(folder / "validation")
    rows = rows_of(token_file, tokenizer)
    batches = EvalBatches(rows, Masking.for_tokenizer(tokenizer, 0.15), 32, batch_size, 0, 1, torch.device("cpu"))
    sums = np.zeros(3)
    for batch in batches:
        for ids, documents, places, labels, weight in zip(
            *(batch[n] for n in ("input_ids", "document_ids", "masked_positions", "masked_labels", "masked_weights")),
            strict=True,
        ):
            for number in range(1, int(documents.max()) + 1):
                inside = (documents == number).nonzero().flatten()
                mine = [(p, lab) for p, lab, w in zip(places, labels, weight, strict=True) if w and p in inside]
                if not mine:
                    continue
                with torch.no_grad():
                    logits = model(input_ids=ids[inside][None]).logits[0]
                for place, label in mine:
                    prediction = logits[int(place - inside[0])].double()
                    loss = torch.nn.functional.cross_entropy(prediction[None], label[None])
                    sums += [loss.item(), (prediction.argmax() == label).item(), 1]
    return sums[0] / sums[2], sums[1] / sums[2]


def test_it_learns_more_than_token_frequencies(finished):
    numbers = results(finished.out)
    assert numbers["eval_loss"] < numbers["unigram_loss"] - 0.1
    by_step = losses(finished.out)
    assert np.mean([by_step[s] for s in range(281, 301)]) < np.mean([by_step[s] for s in range(1, 21)]) - 0.15


def test_the_screen_shows_what_the_issue_promises(finished):
    for words in ("held-out", "unigram baseline", "real tokens/s", "utilisation", "curves.png", "[MASK]", "->"):
        assert words in finished.stdout, words
    assert "step 300" in finished.stderr and "tokens/s" in finished.stderr


def test_evaluation_equals_stock_transformers_document_by_document(finished, tmp_path):
    rows_of = lambda file, tokenizer: DocumentRows(file, Frame.for_masked(tokenizer), 64, tmp_path)  # noqa: E731
    loss, accuracy = stock_evaluation(finished.out, rows_of, prepared(finished.stdout))
    assert results(finished.out)["eval_loss"] == pytest.approx(loss, abs=1e-5)
    assert results(finished.out)["eval_accuracy"] == pytest.approx(accuracy, abs=1e-9)


def test_the_unigram_baseline_equals_a_plain_count(finished, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(finished.out)
    folder = prepared(finished.stdout)
    counts = dict.fromkeys(range(len(tokenizer)), 1)
    for token in TokenFile(folder / "train").tokens.tolist():
        counts[token] += 1
    total, best = sum(counts.values()), max(counts, key=counts.get)
    rows = DocumentRows(TokenFile(folder / "validation"), Frame.for_masked(tokenizer), 64, tmp_path)
    batches = EvalBatches(rows, Masking.for_tokenizer(tokenizer, 0.15), 32, 5, 0, 1, torch.device("cpu"))
    labels = [
        int(label)
        for batch in batches
        for label, weight in zip(batch["masked_labels"].flatten(), batch["masked_weights"].flatten(), strict=True)
        if weight
    ]
    assert results(finished.out)["unigram_loss"] == pytest.approx(
        -np.mean([np.log(counts[n] / total) for n in labels])
    )
    assert results(finished.out)["unigram_accuracy"] == pytest.approx(np.mean([n == best for n in labels]))


def test_the_folder_holds_a_stock_model(finished):
    config = json.loads((finished.out / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"] and config["model_type"] == "bert"
    model, info = AutoModelForMaskedLM.from_pretrained(finished.out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(p.numel() for p in model.parameters()) * 4 == results(finished.out)["parameter_bytes_per_rank"]
    answers = pipeline("fill-mask", model=str(finished.out))("Return the [MASK] of the object.")
    assert len(answers) == 5 and all(0 < answer["score"] < 1 for answer in answers)


def test_results_and_card_say_what_was_done(finished):
    numbers = results(finished.out)
    assert (numbers["train_steps"], numbers["world_size"], numbers["precision"]) == (300, 1, "fp32")
    assert numbers["stop_reason"] == "all steps done" and 0 < numbers["mfu"] < 1.5
    hidden = sum(w.nbytes for name, w in weights(finished.out).items() if w.dim() == 2 and "embed" not in name)
    expected = 2 * numbers["parameter_bytes_per_rank"] - hidden  # Muon keeps one moment of these, AdamW two of others
    assert numbers["optimizer_bytes_per_rank"] == pytest.approx(expected, rel=0.01)
    card = (finished.out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "fill-mask"
    assert "--learning_rate 0.003" in card and f"{numbers['eval_loss']:.3f}" in card
    assert (finished.out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_have_a_row_for_each_step_and_validation(finished):
    rows = training_rows(finished.out)
    assert [row["step"] for row in rows] == list(range(1, 301))
    assert rows[0]["learning_rate"] == 0 and max(row["learning_rate"] for row in rows) == pytest.approx(3e-3)
    text = (finished.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in text if "eval_loss" in line] == [100, 200, 300]


def test_checkpoints_rotate(finished):
    assert sorted(path.name for path in finished.out.glob("step_*")) == ["step_240", "step_300"]


def test_resuming_a_finished_run_changes_nothing(harness, finished, tiny_corpus, cache):
    before = {path: path.stat().st_mtime_ns for path in finished.out.rglob("*")}
    flags = ["--learning_rate", 3e-3, "--resume_from_checkpoint", "latest"]
    result = harness.run(*small_run(tiny_corpus, cache, finished.out, *flags, steps=300, batch=16)).check()
    assert "finished" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in finished.out.rglob("*")} == before


def test_pre_ln_saves_megatron_bert_and_concatenation_evaluates_alike(harness, tiny_corpus, cache, out):
    flags = ["--encoder_ln_mode", "pre-ln", "--packing", "concat", "--gradient_checkpointing"]
    result = harness.run(*small_run(tiny_corpus, cache, out, *flags, steps=12)).check()
    assert json.loads((out / "config.json").read_text())["architectures"] == ["MegatronBertForMaskedLM"]
    assert {"bert.encoder.ln.weight"} <= weights(out).keys() and "bert.embeddings.LayerNorm.weight" not in weights(out)
    rows_of = lambda file, tokenizer: ConcatenatedRows(file, Frame.for_masked(tokenizer), 64)  # noqa: E731
    loss, accuracy = stock_evaluation(out, rows_of, prepared(result.stdout))
    assert results(out)["eval_loss"] == pytest.approx(loss, abs=1e-5)
    assert results(out)["eval_accuracy"] == pytest.approx(accuracy, abs=1e-9)


def test_gradient_checkpointing_changes_nothing_with_dropout_on(harness, tiny_corpus, cache, tmp_path):
    flags = ["--hidden_dropout_prob", 0.1, "--attention_probs_dropout_prob", 0.1]
    plain, recomputed = tmp_path / "plain", tmp_path / "recomputed"
    harness.run(*small_run(tiny_corpus, cache, plain, *flags, steps=6)).check()
    harness.run(*small_run(tiny_corpus, cache, recomputed, *flags, "--gradient_checkpointing", steps=6)).check()
    assert losses(plain) == pytest.approx(losses(recomputed), abs=1e-6)


def test_accumulation_gives_the_loss_of_the_whole_batch(harness, tiny_corpus, cache, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    harness.run(*small_run(tiny_corpus, cache, whole, steps=8)).check()
    harness.run(*small_run(tiny_corpus, cache, cut, "--per_device_train_batch_size", 2, steps=8)).check()
    assert losses(whole) == pytest.approx(losses(cut), abs=1e-5)


def test_a_time_budget_ends_the_run_and_the_schedule(harness, tiny_corpus, cache, out):
    hours = 3 / 3600
    flags = ["--total_training_time", hours, "--finetune_time_markers", "0.3,0.6", "--report_to", "tensorboard"]
    flags += ["--learning_rate", 1e-3]
    result = harness.run(*small_run(tiny_corpus, cache, out, *flags)).check()
    numbers = results(out)
    assert numbers["stop_reason"] == "time budget spent" and "validating" in result.stdout
    rows = training_rows(out)
    readings = np.fromfile(out / "clock.f64")
    assert readings[-1] >= 3.0 > readings[-2]  # one step over at the most
    assert numbers["train_runtime"] == readings[-1] and len(readings) == numbers["train_steps"] == len(rows)
    expected = [0, *readings[:-1] / 3]  # progress before each step
    rates = [1e-3 * (p / 0.06 if p < 0.06 else (1 - p) / 0.94) for p in expected]
    assert [row["learning_rate"] for row in rows] == pytest.approx(rates, rel=1e-9)
    for marker in ("marker_0.3", "marker_0.6"):
        AutoModelForMaskedLM.from_pretrained(out / marker)
    assert list((out / "tracker").rglob("events.out.tfevents*"))


def test_early_exit_keeps_the_longer_schedule(harness, tiny_corpus, cache, out):
    flags = ["--total_training_time", 1, "--early_exit_time_marker", 1.5 / 3600, "--warmup_proportion", 0]
    flags += ["--learning_rate", 1e-3]
    harness.run(*small_run(tiny_corpus, cache, out, *flags)).check()
    assert results(out)["train_runtime"] >= 1.5
    assert training_rows(out)[-1]["learning_rate"] > 0.99e-3


def test_early_stopping_and_validation_in_shards(harness, tiny_corpus, cache, out):
    flags = ["--do_validation", "--shards_per_epoch", 16, "--validation_epochs", 4, "--use_early_stopping"]
    flags += ["--early_stop_time", 0.001, "--early_stop_eval_loss", 1.0]
    harness.run(*small_run(tiny_corpus, cache, out, *flags, steps=500)).check()
    assert results(out)["stop_reason"] == "early stopping" and results(out)["train_steps"] < 100


def test_epochs_end_a_run_and_the_seed_decides(harness, tiny_corpus, cache, tmp_path):
    runs = [tmp_path / name for name in ("a", "b", "c")]
    for out, seed in zip(runs, (1, 1, 2), strict=True):
        harness.run(*small_run(tiny_corpus, cache, out, "--seed", seed, "--num_train_epochs", 0.2)).check()
    assert 0.2 <= results(runs[0])["epoch"] < 0.3
    assert losses(runs[0]) == losses(runs[1]) != losses(runs[2])


def test_continuing_from_existing_weights(harness, finished, tiny_corpus, cache, out):
    command = small_run(tiny_corpus, cache, out, "--model_name_or_path", finished.out, steps=3)
    shape = {"--num_hidden_layers", "--hidden_size", "--num_attention_heads", "--intermediate_size"}
    command = [w for i, w in enumerate(command) if w not in shape and command[i - 1] not in shape]
    command[command.index("--tokenizer_train_vocab_size") + 1] = 500  # the weights' own tokenizer is used
    harness.run(*command).check()
    assert losses(out)[1] < results(finished.out)["unigram_loss"] < np.log(600)


def test_a_custom_optimizer_by_module_and_class(harness, tiny_corpus, cache, tmp_path, out):
    (tmp_path / "my_optimizer.py").write_text(
        "import torch\n\n\nclass SignDescent(torch.optim.Optimizer):\n"
        "    def __init__(self, params, lr, weight_decay=0.0, scale=1.0):\n"
        "        super().__init__(params, {'lr': lr, 'weight_decay': weight_decay, 'scale': scale})\n\n"
        "    @torch.no_grad()\n    def step(self, closure=None):\n        for group in self.param_groups:\n"
        "            for p in group['params']:\n                p -= group['lr'] * group['scale'] * p.grad.sign()\n"
    )
    flags = ["--optimizer_type", "my_optimizer:SignDescent", "--optimizer_args", "scale=0.5"]
    flags += ["--init_output_bias", "zeros"]
    env = {"HOME": str(tmp_path)}
    words = [str(word) for word in small_run(tiny_corpus, cache, out, *flags, steps=30)]
    script = f"{REPOSITORY}/{SCRIPT}"
    harness.run(script, *words[1:], cwd=tmp_path, env=env).check()
    by_step = losses(out)
    assert by_step[30] < by_step[2] - 0.1


def test_extremeberts_best_recipe_runs(harness, finished, cache, out):
    """The whole command of its README on a tiny model; --fp16 is for GPUs, --fp32 stands in for it."""
    folder = prepared(finished.stdout)
    words = EXTREMEBERT.format(tokenizer=folder / "tokenizer", dataset=folder, output=out).split()
    shape = {"--hidden_size": 32, "--num_hidden_layers": 2, "--num_attention_heads": 2, "--intermediate_size": 64}
    smaller = {"--train_batch_size": 64, "--total_training_time": 4 / 3600, "--early_exit_time_marker": 3 / 3600}
    for flag, value in (shape | smaller).items():
        words[words.index(flag) + 1] = value
    result = harness.run(SCRIPT, *words, "--fp32", "--cache_dir", cache, "--max_eval_samples", 16).check()
    assert "note: --deepspeed is ignored" in result.stdout and "note: --data_loader_type" in result.stdout
    assert results(out)["stop_reason"] == "time budget spent" and results(out)["train_runtime"] >= 3
    assert json.loads((out / "config.json").read_text())["model_type"] == "megatron-bert"
    validated = [row["step"] for row in read_metrics(out / "metrics.jsonl") if "eval_loss" in row]
    assert len(validated) > 1, "validation in shards"


def test_a_full_device_halves_its_share_and_keeps_the_global_batch(harness, tiny_corpus, cache, tmp_path):
    """Memory is limited so that 512 rows at once do not fit: a real failure of the allocator.

    oneDNN remembers a primitive that it could not make for want of memory, and never makes it again; so its memory is
    turned off.
    """
    script = tmp_path / "limited.py"
    script.write_text(
        "import os, pathlib, resource, runpy, sys, threading, time\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "used = [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmData')][0]\n"
        "hard = resource.getrlimit(resource.RLIMIT_DATA)[1]\n"
        "resource.setrlimit(resource.RLIMIT_DATA, ((int(used) << 10) + (512 << 20), hard))\n"
        "def lift():\n"
        "    folder = sys.argv[sys.argv.index('--output_dir') + 1]\n"
        "    while not pathlib.Path(folder, os.environ['LIMITED_UNTIL']).exists():\n"
        "        time.sleep(0.002)\n"
        "    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))\n"
        "threading.Thread(target=lift, daemon=True).start()\n"
        f"runpy.run_path({str(REPOSITORY / SCRIPT)!r}, run_name='__main__')\n"
    )
    # the scores of 32 heads in fp32 take 2.6 MB of each row, and little time: 1.4 GB for 512 rows
    flags = ["--per_device_train_batch_size", 512, "--per_device_eval_batch_size", 8]
    flags += ["--num_attention_heads", 32, "--attn_implementation", "plain"]
    words = small_run(tiny_corpus, cache, tmp_path / "full", *flags, steps=1, batch=512)
    env = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
    stopped = harness.run(script, *words[1:], env=env | {"LIMITED_UNTIL": "metrics.jsonl"}).check(2)
    assert "the device is full" in stopped.stderr and "--auto_find_batch_size" in stopped.stderr
    out = tmp_path / "found"
    words = small_run(tiny_corpus, cache, out, *flags, "--auto_find_batch_size", steps=1, batch=512)
    found = harness.run(script, *words[1:], env=env | {"LIMITED_UNTIL": "args.json"}).check()  # while it looks
    cut = re.search(r"global batch 512 rows = (\d+) per device x (\d+) accumulation", found.stdout)
    assert int(cut[1]) < 512 and int(cut[1]) * int(cut[2]) == 512
    reference = tmp_path / "reference"
    flags[1] = int(cut[1])
    harness.run(*small_run(tiny_corpus, cache, reference, *flags, steps=1, batch=512)).check()
    assert losses(out) == losses(reference)
