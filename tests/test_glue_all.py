"""Sweeps of run_glue.py: what is run, what is continued, and what the table says."""

import csv
import json
import os
import signal
import sys

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from common.data.glue import TASKS
from common.errors import UserError
from common.glue.plan import PROTOCOLS, Run, plan_runs, read_seeds
from common.glue.summary import (
    DEGENERATE,
    DIVERGED,
    FAILED,
    FINISHED,
    NOT_RUN,
    RunResult,
    average_line,
    choose_configuration,
    constant_metrics,
    format_table,
    glue_average,
    is_degenerate,
    metric_names,
    summarise,
    write_summary,
)
from common.glue.sweep import device_groups, parse_sweep_arguments, sweep
from pretraining import results, small_run, wait_for_step, weights
from stub_shell import Shell, flag

SCRIPT = "run_glue.py"
STEPS = 8


# ---- The plan --------------------------------------------------------------------------------------


def test_protocols():
    sane = plan_runs("sane", list(TASKS), [1, 2, 3])
    assert len(sane) == 27 and {run.configuration for run in sane} == {(4e-5, 16, 5)}
    assert "mrpc/lr4e-05-seed1" in {run.folder for run in sane}
    grid = plan_runs("grid", list(TASKS), [1])
    assert len(grid) == 6 * 24 + 3 * 4 == len({run.folder for run in grid})  # ExtremeBERT's 156
    chosen = plan_runs("grid", ["mnli"], [5], [1e-5], 64, 2.5)
    assert [run.folder for run in chosen] == ["mnli/lr1e-05-batch64-epochs2.5-seed5"]
    assert PROTOCOLS["grid"].grid("qnli") != PROTOCOLS["grid"].grid("rte")


@pytest.mark.parametrize(("text", "seeds"), [(None, [1, 2]), ("3", [1, 2, 3]), ("7,", [7]), ("1234,9", [1234, 9])])
def test_seeds(text, seeds):
    assert read_seeds(text, default=2) == seeds


@pytest.mark.parametrize("text", ["0", "-1", "a", ",", "1,x", "1.5", "100000", f"{2**32},"])
def test_bad_seeds(text):
    with pytest.raises(UserError, match="seeds"):
        read_seeds(text, default=2)


@pytest.mark.parametrize(
    ("devices", "processes", "groups"),
    [
        (None, 1, [None]),
        ("0,1,2", 1, ["0", "1", "2"]),
        ("4,5,6,7,8", 2, ["4,5", "6,7"]),
        ("3", 2, ["3"]),
    ],
)
def test_devices_are_shared_out(devices, processes, groups):
    words = ["--model_name_or_path", "x", "--data_dir", "y", "--num_processes", str(processes)]
    args, _ = parse_sweep_arguments([*words, *(["--devices", devices] if devices else [])])
    assert device_groups(args) == groups


# ---- The table -------------------------------------------------------------------------------------


def result(task, seed, *metrics, rate=1e-3, status=FINISHED):
    run = Run(task, rate, 16, 5, seed, f"{task}/lr{rate:g}-seed{seed}")
    names = metric_names(task)
    return RunResult(run, status, dict(zip(names, metrics, strict=True)) if metrics else None)


def test_the_constant_answer():
    labels = np.array([1] * 68 + [0] * 32)
    ones = np.ones_like(labels)
    words = {"": [str(label) for label in labels]}
    assert constant_metrics("mrpc", words) == {
        "f1": pytest.approx(f1_score(labels, ones)),
        "accuracy": pytest.approx(accuracy_score(labels, ones)),
    }
    assert constant_metrics("qqp", {"": [str(1 - label) for label in labels]}) == {"f1": 0.0, "accuracy": 0.68}
    assert constant_metrics("cola", words) == {"matthews_correlation": matthews_corrcoef(labels, ones)}
    assert constant_metrics("stsb", {"": ["1.5", "2", "2"]}) == {"pearson": 0.0, "spearmanr": 0.0}
    both = {"": ["entailment"] * 3 + ["neutral"], "_mm": ["neutral"] * 2 + ["entailment", "contradiction"]}
    assert constant_metrics("mnli", both) == {"accuracy": 0.75, "accuracy_mm": 0.5}


def test_a_run_is_degenerate_on_more_than_half_of_its_metrics():
    constant = {"f1": 0.8, "accuracy": 0.68}
    assert is_degenerate({"f1": 0.8, "accuracy": 0.68}, constant)
    assert not is_degenerate({"f1": 0.79, "accuracy": 0.69}, constant)
    assert is_degenerate({"f1": 0.79, "accuracy": 0.1}, constant)
    assert is_degenerate({"accuracy": 1 / 3}, {"accuracy": 1 - 2 / 3}), "a rounding error is not an improvement"


def test_a_diverged_run_counts_as_the_worst_where_the_configuration_is_chosen():
    lucky = [result("rte", 1, 0.9, rate=1e-2)]
    lucky += [result("rte", seed, rate=1e-2, status=DIVERGED) for seed in (2, 3)]
    steady = [result("rte", seed, value, rate=1e-4) for seed, value in ((1, 0.6), (2, 0.5), (3, 0.7))]
    assert choose_configuration(lucky + steady) == steady
    crashed = [result("rte", seed, rate=1e-2, status=FAILED) for seed in (2, 3)]  # says nothing of the configuration
    assert choose_configuration(steady + lucky[:1] + crashed) == lucky[:1] + crashed


def test_median_deviation_and_best_by_hand():
    values = [(0.8, 0.6), (0.9, 0.7), (0.7, 0.8), (0.81, 0.4)]
    runs = [result("mrpc", seed, *pair) for seed, pair in enumerate(values)]
    runs += [result("mrpc", 9, status=DIVERGED), result("mrpc", 10, 0.8, 0.68, status=DEGENERATE)]
    (row,) = summarise(runs, {"mrpc": {"f1": 0.8, "accuracy": 0.68}})
    means = np.array([*values, (0.8, 0.68)]).mean(axis=1)
    assert row.score == pytest.approx(np.median(means)) and row.deviation == pytest.approx(means.std(ddof=1))
    assert row.medians == {"f1": pytest.approx(0.8), "accuracy": pytest.approx(0.68)}
    assert row.best.run.seed == 1 and row.best.score == pytest.approx(0.8) and row.constant == pytest.approx(0.74)
    assert row.seeds == 5 and row.count(DIVERGED) == 1 and row.count(DEGENERATE) == 1
    (alone,) = summarise(runs[:1], {"mrpc": {"f1": 0.8, "accuracy": 0.68}})
    assert alone.deviation is None
    (none,) = summarise([result("mrpc", 1, status=DIVERGED)], {})
    assert none.score is None and none.best is None


def test_the_average_by_hand():
    """The row of BERT-large in the GLUE leaderboard's style: eight tasks, two metrics each counted as their mean."""
    scores = {"cola": 0.605, "sst2": 0.949, "mrpc": (0.893 + 0.854) / 2, "stsb": (0.876 + 0.865) / 2}
    scores |= {"qqp": (0.721 + 0.893) / 2, "mnli": (0.867 + 0.859) / 2, "qnli": 0.927, "rte": 0.701, "wnli": 0.651}
    average, missing = glue_average(scores)
    by_hand = (0.605 + 0.949 + 0.8735 + 0.8705 + 0.807 + 0.863 + 0.927 + 0.701) / 8
    assert average == pytest.approx(by_hand) and missing == []
    assert glue_average(scores | {"wnli": None}) == (pytest.approx(by_hand), [])
    average, missing = glue_average({"rte": 0.7, "sst2": 0.9, "cola": None, "wnli": 0.1})
    assert average == pytest.approx(0.8) and missing == ["cola", "mrpc", "stsb", "qqp", "mnli", "qnli"]
    assert glue_average({"wnli": 0.5})[0] is None


def test_the_table_and_its_files(tmp_path):
    runs = [result("mnli", seed, 0.6 + seed / 100, 0.5 + seed / 100) for seed in (1, 2, 3)]
    runs += [result("wnli", 1, 0.56, status=DEGENERATE), result("rte", 1, status=DIVERGED), result("rte", 2, 0.7)]
    runs += [result("mnli", 1, 0.1, 0.1, rate=9e-3), result("cola", 1, status=NOT_RUN)]
    constants = {"mnli": {"accuracy": 0.35, "accuracy_mm": 0.33}, "wnli": {"accuracy": 0.56}, "rte": {"accuracy": 0.5}}
    rows, text = write_summary(tmp_path, "title", runs, constants, ["sst2"])
    lines = {line.split()[0]: line for line in reversed(text.splitlines()) if line.strip()}
    assert "62.0/52.0" in lines["mnli"] and " 57.00 " in lines["mnli"] and "lr 0.001" in lines["mnli"]
    assert "(not averaged)" in lines["wnli"] and "1 constant" in lines["wnli"] and "no data" in lines["sst2"]
    assert "1 nan" in lines["rte"] and "1 of 2" in lines["rte"] and "rte lr0.001-seed1: diverged" in text
    assert average_line(rows) in text.replace("\n", " ") and "Mean over 2 of GLUE's 8 tasks: 63.50" in average_line(
        rows
    )
    assert text == format_table("title", rows, runs, ["sst2"])
    selected = json.loads((tmp_path / "selected.json").read_text())
    assert selected == {"mnli": "mnli/lr0.001-seed3", "wnli": "wnli/lr0.001-seed1", "rte": "rte/lr0.001-seed2"}
    found = read_csv(tmp_path / "runs.csv")
    assert len(found) == len(runs) and [row["reported"] for row in found].count("0") == 1
    assert float(found[0]["accuracy_mm"]) == pytest.approx(0.51)
    table = {row["task"]: row for row in read_csv(tmp_path / "summary.csv")}
    assert float(table["mnli"]["sd"]) == pytest.approx(0.01) and table["rte"]["diverged"] == "1"
    assert float(table["average"]["score"]) == pytest.approx(0.635)
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG") and not list(tmp_path.glob("*.tmp"))


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ---- Whole sweeps ----------------------------------------------------------------------------------


class Forked:
    """A run_glue.py in a fork of the warm parent, as common.glue.sweep.Process."""

    def __init__(self, running):
        self.running, self.poll = running, running.poll

    def output(self):
        return self.running.stdout_path.read_text() + self.running.stderr_path.read_text()

    def stop(self):
        self.running.signal(signal.SIGTERM)


class Stop:
    """As common.stop.StopSignals, of a signal that comes when some run has logged a step."""

    def __init__(self, out=None, step=None):
        self.out, self.step = out, step

    def listen(self):
        pass

    @property
    def requested(self):
        if self.out is None:
            return 0
        rows = [line for path in self.out.glob("*/*/metrics.jsonl") for line in path.read_text().splitlines()]
        return signal.SIGTERM if any(f'"step": {self.step},' in row for row in rows) else 0


@pytest.fixture(scope="module")
def checkpoint(harness, tiny_corpus, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrained") / "run"
    harness.run(*small_run(tiny_corpus, cache, out, steps=2)).check()
    return out


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """A GLUE root with RTE and MNLI, where the second sentence tells the class; MRPC has no validation split."""
    root = tmp_path_factory.mktemp("glue")
    rng = np.random.default_rng(0)
    answers = {"entailment": "yes", "neutral": "perhaps", "contradiction": "no", "not_entailment": "no"}
    names = {"RTE": ("train", "dev", "test"), "MNLI": ("train", "dev_matched", "dev_mismatched"), "MRPC": ("train",)}
    for folder, splits in names.items():
        (root / folder).mkdir()
        labels = ("entailment", "not_entailment") if folder == "RTE" else tuple(answers)[:3]
        column = "gold_label" if folder == "MNLI" else "label"
        for split in splits:
            lines = [f"index\tsentence1\tsentence2\t{column}"]
            for index in range(128 if split == "train" else 30):
                label = rng.choice(labels)
                lines.append(f"{index}\tthe file is opened\t{answers[label]} it is\t{label}")
            (root / folder / f"{split}.tsv").write_text("".join(f"{line}\n" for line in lines))
    return root


class Sweeps:
    """Runs sweeps in this process, and their runs in forks."""

    def __init__(self, harness, checkpoint, glue):
        self.harness, self.base = harness, ["--model_name_or_path", checkpoint, "--data_dir", glue]

    def __call__(self, out, *flags, stop=None, steps=STEPS):
        """Returns: (exit code, what was said, the words of each run that was started)."""
        said, started = [], []

        def start(args, words, log, device):
            started.append(words)
            return Forked(self.harness.start(SCRIPT, *words))

        words = [*self.base, "--output_dir", out, *flags, "--max_train_steps", steps, "--fp32", "--logging_steps", 1]
        code = sweep([str(word) for word in words], start=start, say=said.append, stop=stop or Stop())
        return code, "\n".join(said), started


@pytest.fixture(scope="module")
def sweeps(harness, checkpoint, glue):
    return Sweeps(harness, checkpoint, glue)


@pytest.fixture(scope="module")
def whole(sweeps, tmp_path_factory):
    """MNLI, and RTE from it; one of the two learning rates makes the loss infinite."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    flags = ["--init_from_mnli", "--learning_rates", "1e-3,1e20", "--seeds", "7,8", "--do_predict"]
    return out, flags, sweeps(out, *flags)


@pytest.mark.slow
def test_a_sweep(whole):
    out, _, (code, said, started) = whole
    assert code == 0 and len(started) == 8 and f"with --max_train_steps {STEPS} --fp32" in said
    assert "left out: cola, sst2, mrpc, stsb, qqp, qnli, wnli" in said and "not predicted: mnli" in said
    for task in ("mnli", "rte"):
        for seed in (7, 8):
            failure = json.loads((out / task / f"lr1e+20-seed{seed}" / "failure.json").read_text())
            assert failure["status"] == "diverged" and " step " in failure["message"]
            assert not list((out / task / f"lr0.001-seed{seed}").glob("step_*"))
    table = {row["task"]: row for row in read_csv(out / "summary.csv")}
    for task, names in (("mnli", ("eval_accuracy", "eval_accuracy_mm")), ("rte", ("eval_accuracy",))):
        found = [results(out / task / f"lr0.001-seed{seed}") for seed in (7, 8)]
        scores = [np.mean([values[name] for name in names]) for values in found]
        row = table[task]
        assert float(row["score"]) == pytest.approx(np.median(scores)) and row["learning_rate"] == "0.001"
        assert float(row["sd"]) == pytest.approx(np.std(scores, ddof=1)) and row["seeds"] == "2"
        assert float(row["best"]) == pytest.approx(max(scores))
    both = [float(table[task]["score"]) for task in ("mnli", "rte")]
    assert float(table["average"]["score"]) == pytest.approx(np.mean(both))
    states = [row["status"] for row in read_csv(out / "runs.csv")]
    assert states.count("diverged") == 4 and "Not the GLUE average" in said
    assert f"bash scripts/make_glue_submission.sh {out}" in said
    selected = json.loads((out / "selected.json").read_text())
    assert (out / selected["rte"] / "predict_results.tsv").exists()


@pytest.mark.slow
def test_rte_starts_from_the_best_mnli_run(whole, checkpoint):
    out, _, (_, _, started) = whole
    best = json.loads((out / "selected.json").read_text())["mnli"]
    assert json.loads((out / "sweep.json").read_text())["mnli_run"] == best
    begun = {words[words.index("--output_dir") + 1]: words for words in started}
    for folder, words in begun.items():
        expected = str(out / best) if "/rte/" in folder else str(checkpoint)
        assert words[words.index("--model_name_or_path") + 1] == expected
        assert ("--ignore_mismatched_sizes" in words) == ("/rte/" in folder)
    order = [words[words.index("--task_name") + 1] for words in started]
    assert order == ["mnli"] * 4 + ["rte"] * 4


@pytest.mark.slow
def test_a_second_call_runs_only_what_is_missing(sweeps, whole):
    out, flags, (_, first, _) = whole
    code, said, started = sweeps(out, *flags)
    assert code == 0 and started == [] and "8 of 8 runs are done already" in said
    table = first[first.index("\nGLUE of") :]
    assert table in said
    _, _, started = sweeps(out, *("7,9" if flag == "7,8" else flag for flag in flags), "--tasks", "rte")
    assert [words[words.index("--seed") + 1] for words in started] == ["9", "9"]
    assert set(json.loads((out / "selected.json").read_text())) == {"mnli", "rte"}, "MNLI's stays"
    with pytest.raises(UserError, match="another flags"):
        sweeps(out, *flags, "--max_seq_length", 64)


@pytest.mark.slow
def test_a_stopped_sweep_continues_where_it_was(sweeps, tmp_path):
    flags = ["--tasks", "rte", "--seeds", "2", "--learning_rates", "1e-3"]
    code, said, _ = sweeps(tmp_path / "a", *flags, stop=Stop(tmp_path / "a", 2), steps=100)
    first = tmp_path / "a" / "rte" / "lr0.001-seed1"
    assert code == 143 and "the same command continues" in said and not (first / "all_results.json").exists()
    code, said, started = sweeps(tmp_path / "a", *flags, steps=100)
    assert code == 0 and len(started) == 2
    assert sweeps(tmp_path / "b", *flags, steps=100)[0] == 0
    for seed in (1, 2):
        mine, theirs = (weights(tmp_path / name / "rte" / f"lr0.001-seed{seed}") for name in "ab")
        assert all(mine[name].equal(theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_failed_run_is_marked_the_others_go_on_and_it_is_tried_again(sweeps, glue, tmp_path):
    out = tmp_path / "out"
    blocked = out / "rte" / "lr0.001-seed1"
    (blocked / "config.json").mkdir(parents=True)  # a file of somebody else's
    flags = ["--tasks", "rte", "--seeds", "2", "--learning_rates", "1e-3"]
    code, said, _ = sweeps(out, *flags)
    assert code == 1 and "rte lr0.001-seed1: failed: exit code 2, --output_dir" in said and "1 of 2" in said
    assert results(out / "rte" / "lr0.001-seed2")["train_steps"] == STEPS
    (blocked / "config.json").rmdir()
    code, _, started = sweeps(out, *flags)
    assert code == 0 and len(started) == 1 and not (blocked / "failure.json").exists()


@pytest.mark.exhaustive
def test_a_killed_sweep_under_the_real_launcher(harness, checkpoint, glue, tmp_path):
    """The run outlives the sweep; the next call waits for it instead of starting it twice."""
    out = tmp_path / "out"
    words = [sys.executable, "-m", "common.glue.sweep", "--model_name_or_path", checkpoint, "--data_dir", glue]
    words += ["--config_file", "accelerate_configs/cpu.yaml", "--mixed_precision", "no", "--tasks", "rte"]
    words += ["--output_dir", out, "--seeds", 1, "--learning_rates", "1e-3,1e20", "--logging_steps", 1]
    words += ["--num_train_epochs", 400]
    run = out / "rte" / "lr0.001-seed1"
    process = harness.start_command(*words)
    wait_for_step(process, run, 3)
    process.signal(signal.SIGKILL)
    process.wait()
    done = harness.command(*words).check()
    assert "a process of an earlier call still runs" in done.stdout
    assert "[2/2]" in done.stdout
    assert "diverged: the loss became" in done.stdout or "diverged: the weights" in done.stdout
    steps = [json.loads(line).get("step") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[:-1] == list(range(1, results(run)["train_steps"] + 1))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "3"], "--seed is the sweep's to set: give seeds"),
        (["--learning-rate=3"], "--learning-rate=3 is the sweep's to set: give --learning_rates"),
        (["--learning_rates", "1e-5,x"], "--learning_rates 1e-5,x: give numbers"),
        (["--learning_rates", "-1"], "--learning_rate -1.0 must be above 0"),
        (["--weight_dekay", "3"], "unknown argument --weight_dekay: did you mean --weight_decay"),
        (["--protocol", "mad"], "--protocol mad is unknown: choose one of sane, grid"),
        (["--tasks", "rte,mrcp"], "--task_name mrcp is unknown"),
        (["--tasks", "rte,ax"], "task ax is not trained for: name mnli"),
        (["--tasks", "cola"], "holds the files of no task; folders looked for: CoLA"),
        (["--tasks", "rte", "--init_from_mnli"], "--init_from_mnli needs MNLI"),
        (["--init_from_mnli", "--random_weights"], "contradict each other"),
        (["--model_name_or_path", "./absent"], "checkpoint ./absent: no config.json there"),
    ],
)
def test_bad_input_starts_nothing(glue, tmp_path, flags, message):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    words = ["--model_name_or_path", tmp_path / "checkpoint", "--data_dir", glue, "--output_dir", tmp_path / "out"]
    with pytest.raises(UserError) as caught:
        sweep([*map(str, words), *flags], start=None, say=lambda _: None, stop=Stop())
    assert message in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "out").exists()


# ---- The shell script ------------------------------------------------------------------------------


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path, "run_glue_all.sh")


def test_the_script_hands_on_what_it_is_given(shell):
    (call,) = shell.run("my run", "a glue", "1,2", "cpu", "--tasks", "rte", "--weight_decay", "0.1")
    assert call["argv"][:2] == ["-m", "common.glue.sweep"] and call["cwd"] == str(shell.here)
    assert call["env"]["PYTHONPATH"].split(os.pathsep)[0] == str(shell.repository)
    assert call["argv"][-4:] == ["--tasks", "rte", "--weight_decay", "0.1"]
    assert flag(call, "--model_name_or_path") == "my run" and flag(call, "--data_dir") == "a glue"
    assert flag(call, "--seeds") == "1,2" and flag(call, "--devices") is None
    assert call["env"]["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(
    ("config", "visible", "name", "devices", "processes", "threads"),
    [
        ("", None, "single_gpu", "0,1,2,3", "1", "3"),
        ("ddp", None, "ddp", "0,1,2,3", "2", "3"),
        ("", "2,3", "single_gpu", "2,3", "1", "6"),
        ("cpu", None, "cpu", None, "1", "12"),
        ("", "", "cpu", None, "1", "12"),
    ],
)
def test_one_run_for_each_gpu(shell, config, visible, name, devices, processes, threads):
    shell.machine(gpus="\n".join(f"GPU {number}: A100" for number in range(4)), nproc=12, lscpu=",\n,")
    (call,) = shell.run("run", "glue", "5", config, **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    assert flag(call, "--config_file") == str(shell.repository / "accelerate_configs" / f"{name}.yaml")
    assert flag(call, "--devices") == devices and flag(call, "--num_processes") == processes
    assert call["env"]["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize("words", [["run"], ["run", "glue", "5", "cpu", "surplus"], ["--tasks", "rte"]])
def test_the_script_refuses_a_wrong_number_of_arguments(shell, words):
    said = shell.fail(*words)
    assert said.startswith("error: ") and "Usage: bash scripts/run_glue_all.sh" in said
