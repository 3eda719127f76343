"""run_glue.py on a small checkpoint: scores, processes, resume, predictions, bad input."""

import csv
import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from common.data.examples import GroupedBatches, encode_examples
from common.data.glue import TASKS, read_task_file
from common.metrics import GlueMetric
from common.report import read_metrics
from glue_hub import hub_folder
from harness import REPOSITORY
from pretraining import fp32_copy, results, small_run, wait_for_step, weights
from strategies import small_chunks

SCRIPT = "run_glue.py"
COLOSSALAI = ("colossalai_ddp", "colossalai_zero1", "colossalai_zero2")
GEMINI = ("colossalai_gemini_auto", "colossalai_gemini_offload")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(harness, tiny_corpus, cache, tmp_path_factory):
    """A checkpoint of run_pretraining.py."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    harness.run(*small_run(tiny_corpus, cache, out, steps=2)).check()
    return out


@pytest.fixture(scope="module")
def rte(tmp_path_factory):
    """A folder in RTE's layout: 150 + 37 + 20 pairs; entailed where the second sentence repeats the first's end."""
    folder = tmp_path_factory.mktemp("RTE")
    rng = np.random.default_rng(0)
    words = "the file is opened and read line by line until its end then it is closed again".split()
    for name, number in (("train", 150), ("dev", 37), ("test", 20)):
        lines = ["index\tsentence1\tsentence2" + ("" if name == "test" else "\tlabel")]
        for index in range(number):
            first = " ".join(rng.choice(words, rng.integers(4, 30)))
            entailed = rng.random() < 0.5
            second = first.split()[-3:] if entailed else rng.choice(words, 3).tolist()
            label = "" if name == "test" else "\tentailment" if entailed else "\tnot_entailment"
            lines.append(f"{index}\t{first}\t{' '.join(second)}{label}")
        (folder / f"{name}.tsv").write_text("".join(f"{line}\n" for line in lines))
    return folder


def command(checkpoint, data, out, *flags, task="rte"):
    flags = ["--model_name_or_path", checkpoint, "--task_name", task, "--data_dir", data, "--output_dir", out, *flags]
    return [SCRIPT, *flags, "--fp32", "--do_train", "--do_eval", "--logging_steps", 1, "--learning_rate", 1e-3]


def table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))


def log(out):
    rows = read_metrics(out / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


@pytest.fixture(scope="module")
def whole(harness, checkpoint, rte, tmp_path_factory):
    out = tmp_path_factory.mktemp("glue") / "run"
    flags = ["--do_predict", "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 4]
    harness.run(*command(checkpoint, rte, out, *flags)).check()
    return out


def test_results_predictions_and_checkpoint(whole, rte):
    found = results(whole)
    assert found["train_steps"] == 30 and found["eval_samples"] == 37 and found["task"] == "rte"
    predicted = table(whole / "eval_predictions.tsv")
    assert [row["index"] for row in predicted] == [str(number) for number in range(37)]
    right = [row["prediction"] == row["label"] for row in predicted]
    assert found["eval_accuracy"] == pytest.approx(np.mean(right), abs=1e-9)
    assert found["eval_loss"] == pytest.approx(np.mean([float(row["loss"]) for row in predicted]), abs=1e-5)
    with Image.open(whole / "eval_plot.png") as image:
        assert image.size == (780, 660)
    assert [row["prediction"] in TASKS["rte"].labels for row in table(whole / "predict_results.tsv")] == [True] * 20
    # stock transformers, one example at a time, without padding
    model, info = AutoModelForSequenceClassification.from_pretrained(whole, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.id2label == {0: "entailment", 1: "not_entailment"}
    tokenizer = AutoTokenizer.from_pretrained(whole)
    for row, example in zip(predicted, read_task_file(TASKS["rte"], rte / "dev.tsv", True), strict=True):
        with torch.no_grad():
            logits = model.eval()(**tokenizer(*example.texts, return_tensors="pt")).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(example.label)).item()
        assert float(row["loss"]) == pytest.approx(loss, abs=2e-5)


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "ddp",
        "zero2",
        "fsdp",
        *(
            pytest.param(n, marks=pytest.mark.exhaustive)
            for n in ("zero1", "zero3", "zero2_offload", "zero3_offload", "fsdp_offload", *COLOSSALAI)
        ),
    ],
)
def test_two_processes_score_as_one(harness, whole, checkpoint, rte, tmp_path, shows, name):
    shows(name, SCRIPT, 2)
    out, config = tmp_path / "two", f"accelerate_configs/{name}.yaml"
    words = command(checkpoint, rte, out, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2)
    for rank in harness.launch(*words, config=fp32_copy(config, tmp_path)):
        rank.check()
    one, two = results(whole), results(out)
    assert two["world_size"] == 2 and two["eval_accuracy"] == pytest.approx(one["eval_accuracy"], abs=1e-6)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], abs=1e-5)
    mine, theirs = weights(out), weights(whole)
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in theirs) < 1e-5


@pytest.mark.parametrize(
    "name", ["colossalai_gemini", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in GEMINI)]
)
def test_gemini_scores_as_one_process_nearly(harness, whole, checkpoint, rte, tmp_path, shows, name):
    """In weights of bf16, where the others have autocast."""
    shows(name, SCRIPT, 2)
    out = tmp_path / "two"
    words = command(checkpoint, rte, out, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2)
    words = [word for word in words if word != "--fp32"]
    for rank in harness.launch(*words, config=small_chunks(name, tmp_path), num_processes=None):
        rank.check()
    assert results(out)["world_size"] == 2 and "Gemini" in results(out)["strategy"]
    assert results(out)["eval_loss"] == pytest.approx(results(whole)["eval_loss"], abs=2e-2)


def test_training_equals_a_plain_loop_with_stock_transformers(harness, checkpoint, rte, tmp_path):
    out = tmp_path / "run"
    steps = 12
    flags = ["--per_device_train_batch_size", 16, "--max_train_steps", steps, "--warmup_steps", 3]
    harness.run(
        *command(checkpoint, rte, out, *flags, "--lr_scheduler_type", "constant", "--max_grad_norm", 0)
    ).check()
    tokenizer, task = AutoTokenizer.from_pretrained(checkpoint), TASKS["rte"]
    examples = read_task_file(task, rte / "train.tsv", True)
    encoded = encode_examples(examples, task, tokenizer, 128, pad_to_max_length=False)
    order = GroupedBatches(encoded, 42, 16, 1, 0, 1, torch.device("cpu"))
    batches = [rows for epoch in (0, 1) for rows in order.global_batches(epoch)][:steps]
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2).train()
    assert model.config.hidden_dropout_prob == 0  # the checkpoint's, so that neither loop draws anything
    model.load_state_dict(first_weights(harness, checkpoint, rte, tmp_path))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for step, rows in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, step / 3)
        texts = list(zip(*(examples[row].texts for row in rows), strict=True))
        batch = tokenizer(*map(list, texts), padding="max_length", max_length=128, return_tensors="pt")
        loss = model(**batch, labels=torch.tensor([examples[row].label for row in rows])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [row["loss"] for row in log(out) if "loss" in row] == pytest.approx(losses, abs=2e-5)


def first_weights(harness, checkpoint, rte, tmp_path):
    """The weights that a run begins with: a step at rate 0."""
    out = tmp_path / "first"
    flags = ["--max_train_steps", 1, "--warmup_steps", 1, "--per_device_train_batch_size", 16]
    harness.run(*command(checkpoint, rte, out, *flags)).check()
    return weights(out)


def test_stopped_and_killed_runs_continue_as_if_they_had_not_been(harness, whole, checkpoint, rte, tmp_path):
    out = tmp_path / "run"
    flags = ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 4, "--checkpointing_steps", 3]
    words = command(checkpoint, rte, out, *flags, "--resume_from_checkpoint", "latest")
    for number, step in ((signal.SIGTERM, 5), (signal.SIGKILL, 12)):
        process = harness.start(*words, pause_at=step)
        wait_for_step(process, out, step)
        process.signal(number)
        process.wait()
    assert re.search(r"rte 100%  \d+:\d\d<0:00, step 30\b", harness.run(*words).check().stderr)
    assert log(out) == log(whole)
    mine, theirs = weights(out), weights(whole)
    assert all(mine[name].equal(theirs[name]) for name in theirs)
    assert "finished" in harness.run(*words).check().stdout


def test_regression_and_a_table_of_ones_own(harness, checkpoint, tmp_path):
    rng = np.random.default_rng(1)
    words = "file function module class string number list object".split()
    for name, number in (("train", 60), ("dev", 30)):
        values = rng.integers(0, 8, number).tolist()
        lines = [{"sentence": f"a {words[value]}", "label": value + 0.5} for value in values]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "run"
    files = ["--train_file", tmp_path / "train.jsonl", "--validation_file", tmp_path / "dev.jsonl"]
    flags = ["--model_name_or_path", checkpoint, "--output_dir", out, "--do_train", "--do_eval", "--fp32"]
    harness.run(SCRIPT, *flags, *files, "--learning_rate", 3e-3, "--num_train_epochs", 8).check()
    predicted = table(out / "eval_predictions.tsv")
    values = [np.float32([row[name] for row in predicted]).astype(float) for name in ("label", "prediction")]
    assert results(out)["eval_pearson"] == pytest.approx(pearsonr(*values).statistic, abs=1e-6)
    assert results(out)["eval_spearmanr"] == pytest.approx(spearmanr(*values).statistic, abs=1e-6)
    assert results(out)["eval_pearson"] > 0.5


def test_metrics_are_the_official_ones():
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 2, 200), rng.integers(0, 2, 200)
    both = {"predictions": guess.tolist(), "references": truth.tolist()}
    true_positive = ((truth == 1) & (guess == 1)).sum()
    f1 = 2 * true_positive / (truth.sum() + guess.sum())
    assert GlueMetric(("f1", "accuracy"), False).compute(**both) == {
        "f1": pytest.approx(f1),
        "accuracy": pytest.approx((truth == guess).mean()),
    }
    assert f1 == pytest.approx(f1_score(truth, guess)) and accuracy_score(truth, guess) == (truth == guess).mean()
    correlation = np.corrcoef(truth, guess)[0, 1]  # Matthews' coefficient is Pearson's of two binary variables
    assert GlueMetric(("matthews_correlation",), False).compute(**both)["matthews_correlation"] == pytest.approx(
        correlation
    )
    assert matthews_corrcoef(truth, guess) == pytest.approx(correlation)
    scores, other = rng.normal(size=50), rng.normal(size=50)
    found = GlueMetric(("pearson", "spearmanr"), True).compute(predictions=other.tolist(), references=scores.tolist())
    ranks = [np.argsort(np.argsort(values)) for values in (scores, other)]
    assert found == {
        "pearson": pytest.approx(np.corrcoef(scores, other)[0, 1]),
        "spearmanr": pytest.approx(np.corrcoef(*ranks)[0, 1]),
    }
    flat = GlueMetric(("pearson", "spearmanr"), True).compute(predictions=[1.0] * 3, references=[1.0, 2.0, 3.0])
    assert flat == {"pearson": 0.0, "spearmanr": 0.0}


# ExtremeBERT's README, "Example for finetuning on MRPC", whole
EXTREMEBERT = """
  --model_name_or_path {checkpoint} --task_name MRPC --max_seq_length 128 --output_dir {output}
  --overwrite_output_dir --do_train --do_eval --evaluation_strategy steps --per_device_train_batch_size 32
  --gradient_accumulation_steps 1 --per_device_eval_batch_size 32 --learning_rate 5e-5 --weight_decay 0.01
  --eval_steps 50 --evaluation_strategy steps --max_grad_norm 1.0 --num_train_epochs 5
  --lr_scheduler_type polynomial --warmup_steps 50
"""
# what its run_glue.sh gives besides
EXTREMEBERT_SHELL = """
  --do_predict --logging_strategy steps --evaluation_strategy no --save_strategy no --warmup_ratio 0.06
  --disable_tqdm True --finetune_checkpoint_at_end True --fp16_full_eval True --num_train_epochs 1
"""


def test_the_example_command_of_extremebert(harness, checkpoint, tmp_path):
    """Word for word, where a folder has the name and the layout of the hub's repository."""
    hub_folder(tmp_path / "nyu-mll" / "glue", rows=340)
    out = tmp_path / "run"
    words = EXTREMEBERT.format(checkpoint=checkpoint, output=out).split()
    done = harness.run(REPOSITORY / SCRIPT, *words, cwd=tmp_path).check()
    found = results(out)
    assert "step 50: eval_f1" in done.stdout and found["train_steps"] == 5 * 11 and found["eval_samples"] == 340
    rates = {row["step"]: row["learning_rate"] for row in log(out) if "learning_rate" in row}
    assert rates[50] == pytest.approx(5e-5 * 49 / 50) and rates[55] == pytest.approx(5e-5 / 5)  # down a line, to 0
    words += EXTREMEBERT_SHELL.split()
    done = harness.run(REPOSITORY / SCRIPT, *words, cwd=tmp_path).check()
    notes = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("note: ")]
    assert notes == ["--logging_strategy", "--disable_tqdm", "--finetune_checkpoint_at_end", "--fp16_full_eval"]
    assert results(out)["train_steps"] == 11 and not list(out.glob("step_*"))
    assert len(table(out / "predict_results.tsv")) == 340


def test_the_diagnostic_set_with_a_model_of_mnli(harness, checkpoint, tmp_path):
    hub = hub_folder(tmp_path / "hub", rows=6)
    out, alone = tmp_path / "run", tmp_path / "alone"
    flags = ["--dataset_name", hub, "--max_seq_length", 32, "--do_predict", "--fp32"]
    training = ["--do_train", "--do_eval", "--num_train_epochs", 1, "--output_dir", out]
    harness.run(SCRIPT, "--model_name_or_path", checkpoint, "--task_name", "mnli", *flags, *training).check()
    assert {"eval_accuracy", "eval_accuracy_mm"} < results(out).keys() and (out / "eval_plot_mm.png").exists()
    predicted = {suffix: table(out / f"predict_results{suffix}.tsv") for suffix in ("", "_mm", "_ax")}
    assert all([row["index"] for row in rows] == [str(n) for n in range(10, 16)] for rows in predicted.values())
    words = ["--task_name", "ax", *flags, "--output_dir", alone]
    harness.run(SCRIPT, "--model_name_or_path", out, *words).check()
    assert table(alone / "predict_results.tsv") == predicted["_ax"] and results(alone)["task"] == "ax"
    done = harness.run(SCRIPT, "--model_name_or_path", checkpoint, *words, "--overwrite_output_dir").check(2)
    assert "has no head for ax" in done.stderr and "fine-tune it with --do_train" in done.stderr


def test_without_training_the_head_must_be_the_tasks(harness, whole, rte, tmp_path):
    words = ["--data_dir", rte, "--do_eval", "--output_dir", tmp_path / "run", "--fp32"]
    config = json.loads((whole / "config.json").read_text())
    for name, classes in (("same", ["entailment", "not_entailment"]), ("other", ["not_entailment", "entailment"])):
        copy = shutil.copytree(whole, tmp_path / name)
        changed = config | {"id2label": dict(enumerate(classes)), "label2id": dict(zip(classes, (0, 1), strict=True))}
        (copy / "config.json").write_text(json.dumps(changed))
    harness.run(SCRIPT, "--model_name_or_path", tmp_path / "same", "--task_name", "rte", *words).check()
    assert results(tmp_path / "run")["eval_accuracy"] == results(whole)["eval_accuracy"]
    words = ["--model_name_or_path", tmp_path / "other", "--task_name", "rte", *words, "--overwrite_output_dir"]
    done = harness.run(SCRIPT, *words).check(2)
    assert "its head decides between not_entailment, entailment, rte between entailment, not_ent" in done.stderr


def test_check_arguments_reads_everything_and_writes_nothing(harness, checkpoint, rte, tmp_path):
    out = tmp_path / "run"
    words = [*command(checkpoint, rte, out), "--check_arguments"]
    harness.run(*words).check()
    for flags, message in (
        (["--max_seq_length", 1000], "above the model's 512 positions"),
        (["--train_batch_size", 32, "--per_device_train_batch_size", 5], "--train_batch_size 32"),
        (["--resume_from_checkpoint", "absent"], "--resume_from_checkpoint absent does not exist"),
        (["--optimizer_type", "nothing"], "--optimizer_type nothing"),
        (["--validation_file", "absent.tsv"], "absent.tsv: No such file"),
    ):
        done = harness.run(*words, *flags).check(2)
        assert message in done.stderr and done.stderr.count("\n") == 1
    assert not out.exists()
    env = {"WORLD_SIZE": "3"}  # as the shell scripts announce processes that are yet to be started
    done = harness.run(*words, "--train_batch_size", 32, env=env).check(2)
    assert "--train_batch_size 32" in done.stderr


def test_checkpoints_to_resume_from_are_saved_when_asked(harness, checkpoint, rte, tmp_path):
    kept = {}
    for strategy in ("no", "epoch", "steps"):
        out = tmp_path / strategy
        flags = ["--save_strategy", strategy, "--save_steps", 2, "--per_device_train_batch_size", 50]
        harness.run(*command(checkpoint, rte, out, *flags, "--save_total_limit", 9)).check()
        kept[strategy] = sorted(int(path.name.partition("_")[2]) for path in out.glob("step_*"))
    assert kept == {"no": [], "epoch": [3, 6, 9], "steps": [2, 4, 6, 8, 9]}


def test_a_checkpoint_in_training(harness, checkpoint, rte, tmp_path):
    """step_N of a run whose final weights are the same: what comes of it is, too."""
    out = tmp_path / "run"
    flags = ["--max_train_steps", 2]
    harness.run(*command(checkpoint / "step_2", rte, out, *flags)).check()
    harness.run(*command(checkpoint, rte, tmp_path / "same", *flags)).check()
    assert log(out) == log(tmp_path / "same")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--task_name mrcp", "--task_name mrcp is unknown: choose one of cola"),
        ("--max_seq_length 1000", "--max_seq_length 1000 is above the model's 512 positions"),
        ("--learning_rate 0", "--learning_rate 0.0 must be above 0"),
        ("--eval_strategy steps", "--eval_strategy steps needs --eval_steps"),
        ("--train_file absent.tsv", "absent.tsv: No such file"),
        ("--model_name_or_path absent_folder", "--model_name_or_path absent_folder"),
        ("--lernrate 3", "unknown argument --lernrate"),
        ("--train_file {rte}/test.tsv", "test.tsv: has no column 'label' (it has index, sentence1, sentence2)"),
        ("--validation_file {rte}/other.tsv", "other.tsv, line 3: label 'perhaps' is none of entailment, not_ent"),
        (
            "--task_name stsb --train_file {rte}/scores.tsv",
            "scores.tsv, line 2: score '5.5' is not a number in [0, 5]",
        ),
        ("--task_name qnli", "train.tsv: has no column 'question'"),
        ("--optimizer_type sophia", "--optimizer_type sophia: Sophia draws labels from one softmax"),
        ("--save_strategy often", "--save_strategy often is unknown: choose one of no, steps, epoch"),
    ],
)
def test_bad_input_ends_in_one_line(harness, checkpoint, rte, tmp_path, flags, message):
    write(rte / "other.tsv", "index\tsentence1\tsentence2\tlabel", "0\ta\tb\tentailment", "1\ta\tb\tperhaps")
    write(rte / "scores.tsv", "index\tsentence1\tsentence2\tscore", "0\ta\tb\t5.5")
    done = harness.run(*command(checkpoint, rte, tmp_path / "run"), *flags.format(rte=rte).split()).check(2)
    assert message in done.stderr and done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()
