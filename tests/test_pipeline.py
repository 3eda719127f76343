"""A pipeline from one YAML: how it is read, what it plans, how its stages run and go on, what they have scored."""

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from statistics import stdev

import pytest

from common.arguments import parse_pretraining_arguments
from common.data.glue import TASKS
from common.errors import UserError
from common.glue.plan import Run as GlueRun
from common.glue.summary import DIVERGED, FINISHED, RunResult, write_summary
from common.logged_process import lock_log
from common.pipeline.collect import collect
from common.pipeline.config import read_pipeline
from common.pipeline.plan import STAGES, Command, Stage, plan
from common.pipeline.run import Stamps, main, refuse_gaps, run_stage
from common.stop import StopSignals
from harness import REPOSITORY
from one_yaml import SMALL, Page, written
from pretraining import EXTREMEBERT, results, wait_for_step

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
# The forms that ExtremeBERT publishes: its configs/*.yaml and the pieces of its docs/PIPELINE_CONFIG.md
SIMPLE = """
SYSTEM: {NUM_GPUS: 4}
DATASET:
  HUGGINGFACE_DATASETS:
    - [wikipedia, 20220301.simple]
    - [wikipedia, 20220301.frr]
PRETRAIN: {NUM_STEPS: 100}
FINETUNE:
  MULTIPROCESS_GPU_LIST:
    - [0, 1]
    - [2, 3]
TOKENIZER: {NAME_OR_PATH: bert-large-uncased}
"""
LARGE = """
SYSTEM: {NUM_GPUS: 4, MAX_MEMORY_IN_GB: 64}
DATASET:
  HUGGINGFACE_DATASETS:
    - [wikipedia, 20220301.en]
    - [bookcorpusopen, plain_text]
PRETRAIN: {NUM_STEPS: 23000}
TOKENIZER: {NAME_OR_PATH: bert-large-uncased}
"""
CUSTOMIZED = """
SYSTEM: {NUM_GPUS: 4, MAX_MEMORY_IN_GB: 64}
DATASET:
  CUSTOMIZED_DATASETS:
    - raw_data/wikipedia
    - raw_data/bookcorpus
PRETRAIN: {NUM_STEPS: 23000}
TOKENIZER: {NAME_OR_PATH: bert-large-uncased}
"""
DOCUMENTED = """
SYSTEM: {NUM_GPUS: 4, MAX_MEMORY_IN_GB: 16}
TOKENIZER: {NAME_OR_PATH: bert-large-uncased}
DATASET:
  ENABLED: True
  ID: bert-dataset
  HUGGINGFACE_DATASETS:
    - [wikipedia, 20220301.en]
    - [bookcorpusopen, plain_text]
  CUSTOMIZED_DATASETS:
    - /data/pile
    - /data/customized-dataset
PRETRAIN: {ENABLED: True, NUM_STEPS: 23000, OPTIMIZER: adamw, LEARNING_RATE: 1e-3}
FINETUNE:
  ENABLED: True
  MULTIPROCESS_GPU_LIST:
    - [0, 1]
    - [2, 3]
RESULT_COLLECTION: {ENABLED: True}
WANDB: {API_KEY: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx}
"""


def planned(path, out=Path("runs/x")):
    """{name of a stage: its commands, as text}."""
    return {stage.name: [str(command) for command in stage.commands] for stage in plan(read_pipeline(path), out)}


def value_of(command, flag):
    words = command.split()
    return words[words.index(flag) + 1]


# ---- YAML and plan -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_yaml_is_planned_and_nothing_is_written(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([str(path), "--dry_run"]) == 0
    said = capsys.readouterr().out
    for number, name in enumerate(STAGES, start=1):
        assert re.search(rf"^{number}\. {name}: .*\n     \S.*\n(     .*\n)*   writes .*; time: \S", said, re.MULTILINE)
    for script in re.findall(r"(?:bash|python) (\S+\.(?:sh|py)) ", said):
        assert (tmp_path / script).resolve().is_relative_to(REPOSITORY) and (tmp_path / script).exists()
    assert "time in all: about" in said and not list(tmp_path.iterdir())


def test_the_batch_of_24_hours_grows_as_crammings_where_the_speed_is_known(tmp_path):
    """The line of the YAML that waits for a number: at an even speed the batch is Cramming's at each time."""
    config = (REPOSITORY / "configs" / "24h-single-gpu.yaml").read_text()
    in_24_hours, line = 70_000_000, "  # rampup_batch_size: [128, 128, ROWS]"
    assert line in config
    config = config.replace(line, f"  rampup_batch_size: [128, 128, {int(0.6 * in_24_hours)}]")
    (command,) = planned(written(tmp_path, config))["pretrain"]
    words = command.partition("run_pretraining.sh")[2].split()[4:]
    args = parse_pretraining_arguments(words)[2]
    ramp = args.batch_ramp
    assert ramp.cut(args.per_device_train_batch_size, 1) == (128, 64) and args.lr_schedule == "time"
    for rows in range(0, in_24_hours, 100_000):  # linear from a micro-batch on, whole micro-batches
        assert abs(ramp.at(rows)[0] - min(8192, 128 + 8192 * rows / (0.6 * in_24_hours))) <= 2 * 128


@pytest.mark.parametrize("text", [SIMPLE, LARGE, CUSTOMIZED, DOCUMENTED])
def test_extremeberts_files_mean_its_recipe(text, tmp_path, monkeypatch):
    """Its own command, in tests/pretraining.py, differs where its pipeline does: micro batch, curve, what ends it."""
    monkeypatch.chdir(REPOSITORY)
    stages = planned(written(tmp_path, text))
    assert list(stages) == list(STAGES)
    (command,) = stages["pretrain"]
    assert command.startswith("CUDA_VISIBLE_DEVICES=0,1,2,3 bash scripts/run_pretraining.sh '' '' '' runs/x/")
    words = command.partition("run_pretraining.sh")[2].split()[4:]
    words = [word for word in words if word not in ("--report_to", "wandb")]  # not installed here
    found = [
        {name: value for group in parse_pretraining_arguments(argv)[:3] for name, value in vars(group).items()}
        for argv in (words, EXTREMEBERT.format(tokenizer="bert-large-uncased", dataset="x", output="x").split())
    ]
    ours, theirs = found
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    model = parse_pretraining_arguments(words)[0]
    assert model.shape == {name: theirs[name] for name in shape}
    same = (
        "encoder_ln_mode hidden_dropout_prob attention_probs_dropout_prob learning_rate train_batch_size "
        "optimizer_type warmup_proportion max_grad_norm weight_decay adam_beta1 adam_beta2 adam_epsilon "
        "tokenizer_name hidden_act"
    )
    assert {name: ours[name] for name in same.split()} == {name: theirs[name] for name in same.split()}
    steps = 100 if text == SIMPLE else 23000
    assert (ours["max_train_steps"], ours["total_training_time"], ours["lr_schedule"]) == (steps, None, "step")
    assert (ours["lr_scheduler_type"], ours["mlm_probability"]) == ("elastic_step_decay", 0.15)
    assert ("--report_to wandb" in command) == ("WANDB" in text)


def test_the_datasets_and_gpus_of_extremeberts_files(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    (command,) = planned(written(tmp_path, SIMPLE))["tokenizer"]
    wanted = (
        "--dataset_name wikimedia/wikipedia wikimedia/wikipedia --dataset_config_name 20231101.simple 20231101.frr"
    )
    assert wanted in command and "--tokenizer_name bert-large-uncased --output_dir runs/x/data" in command
    (command,) = planned(written(tmp_path, SIMPLE))["finetune"]
    assert command.startswith(
        "CUDA_VISIBLE_DEVICES=0,1,2,3 bash scripts/run_glue_all.sh runs/x/pretrain glue_data '' ddp"
    )
    assert "--protocol grid --init_from_mnli true --do_predict" in command and "--num_processes 2" in command
    stages = planned(written(tmp_path, DOCUMENTED))
    assert "--input /data/pile /data/customized-dataset" in stages["tokenizer"][0]
    assert "lucadiliello/bookcorpusopen --dataset_config_name 20231101.en default" in stages["tokenizer"][0]
    assert "--document_separator blank_line" in stages["tokenizer"][0]
    assert value_of(stages["tokenizer"][0], "--output_dir") == "runs/x/bert-dataset"
    assert "xxxxxx" not in str(stages)  # the key is for the environment alone
    (command,) = planned(written(tmp_path, LARGE))["finetune"]
    assert "glue_data '' single_gpu --protocol grid" in command and "--num_processes" not in command


def test_our_flags_win_and_sections_in_them_have_our_defaults(tmp_path):
    (command,) = planned(written(tmp_path, SIMPLE.replace("100}", "100, per_device_train_batch_size: 32}")))[
        "pretrain"
    ]
    assert command.count("--per_device_train_batch_size") == 1
    assert value_of(command, "--per_device_train_batch_size") == "32"
    (command,) = planned(written(tmp_path, SMALL))["pretrain"]
    assert "--lr_scheduler_type" not in command and "--train_batch_size" not in command
    assert "FRUGAL_SEEDS=7 " in planned(written(tmp_path, SMALL))["finetune"][0]
    text = SMALL.replace("tasks: follows, seeds: [7]", "tasks: [rte, mrpc], seeds: [7], data_dir: g")
    assert " g 7, cpu " in planned(written(tmp_path, text))["finetune"][0]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("PRETRAIN", "PRETRAN", "unknown section PRETRAN: did you mean PRETRAIN?"),
        ("NUM_STEPS", "NUM_STEP", "PRETRAIN.NUM_STEP is unknown: did you mean NUM_STEPS?"),
        ("NUM_STEPS: 100", "num_steps: 100", "PRETRAIN.num_steps is unknown: did you mean NUM_STEPS?"),
        ("NUM_STEPS: 100", "learning_rat: 1", "PRETRAIN.learning_rat is unknown: did you mean learning_rate?"),
        ("NUM_STEPS: 100", "NUM_STEPS: many", "PRETRAIN.NUM_STEPS: many is not a whole number"),
        ("NUM_STEPS: 100", "NUM_STEPS: 100, OPTIMIZER: adamv", "OPTIMIZER adamv is unknown: did you mean adamw?"),
        ("NUM_STEPS: 100", "output_dir: x", "is the pipeline's to set: give --output_dir of run_pipeline.sh"),
        ("[2, 3]", "[2, 3]\n  warmup_ratio: 2", "FINETUNE: --warmup_ratio 2.0 is out of range"),
        ("[2, 3]", "[2, 3]\n  tasks: [rte, cila]", "FINETUNE: "),
        ("[2, 3]", "[2, 3]\n  tasks: [rte, ax]", "FINETUNE: task ax is not trained for: name mnli"),
        ("NUM_STEPS: 100", "mlm_probability: 2", "PRETRAIN: --mlm_probability 2.0 is out of range"),
        ("NUM_STEPS: 100", "NUM_STEPS: 100, NUM_STEPS: 200", "line 7: the key NUM_STEPS stands there twice"),
        ("NUM_GPUS: 4", "NUM_GPUS: 2", "give each GPU once, from 0 to SYSTEM.NUM_GPUS - 1 (1)"),
        ("[2, 3]", "[2]", "all of one length"),
        ("[wikipedia, 20220301.frr]", "wikipedia", "wikipedia is not [name, subset]"),
        ("{NUM_STEPS: 100}", "[NUM_STEPS", "own.yaml, line "),
        ("PRETRAIN: {NUM_STEPS: 100}", "PRETRAIN: 100", "PRETRAIN is no section: put its keys below it"),
        ("- [wikipedia, 20220301.simple]\n    - [wikipedia, 20220301.frr]", "[]", "DATASET names no text: give"),
    ],
)  # fmt: skip
def test_a_faulty_yaml_is_named_in_one_line(tmp_path, old, new, said):
    assert SIMPLE.count(old) == 1
    path = written(tmp_path, SIMPLE.replace(old, new))
    with pytest.raises(UserError) as error:
        plan(read_pipeline(path), tmp_path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    assert said in str(error.value)


def test_what_the_command_line_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words, said in (
        (["absent.yaml"], "absent.yaml: cannot be read"),
        (["own.yaml", "pretraining"], "stage pretraining is unknown: choose environment"),
        (["own.yaml", "finetune"], "stage finetune needs data, which is not done: run it first"),
        (["own.yaml", "--compare_with", "absent"], "--compare_with absent: no such folder"),
        (["own.yaml", "--dry"], "unrecognized arguments: --dry"),
    ):
        written(tmp_path, SMALL)
        with pytest.raises(UserError, match=re.escape(said)):
            main(words)
    written(tmp_path, SIMPLE)
    for stages in ([], ["pretrain"], ["finetune", "report"]):
        with pytest.raises(UserError, match="SYSTEM.NUM_GPUS 4, but this machine shows"):
            main(["own.yaml", *stages])
    assert not (tmp_path / "runs").exists()


def test_stages_that_do_not_train_need_no_gpus(tmp_path, monkeypatch, capsys):
    """What another machine has trained is collected and shown on one without GPUs."""
    monkeypatch.chdir(tmp_path)
    run = GlueRun("rte", 4e-5, 16, 5.0, 1, "rte/1")
    result = RunResult(run, FINISHED, {"accuracy": 0.6})
    config, out = written(tmp_path, SIMPLE), tmp_path / "runs" / "own"
    for name in ("pretrain", "finetune"):
        (out / name).mkdir(parents=True)
    write_summary(out / "finetune", "a sweep", [result], {"rte": {"accuracy": 0.53}}, [])
    for stage in plan(read_pipeline(config), Path("runs/own")):
        if stage.name in ("data", "tokenizer", "pretrain", "finetune"):
            Stamps(out).finish(stage, 1.0)
    for task in TASKS.values():
        (tmp_path / "glue_data" / task.folder).mkdir(parents=True)
    assert main(["own.yaml", "data", "collect", "report"]) == 0
    assert "== data: done already" in capsys.readouterr().out
    assert json.loads((out / "results.json").read_text())["tasks"][0]["median"] == pytest.approx(0.6)
    assert "SYSTEM" in Page((out / "report.html").read_text()).text
    assert main(["own.yaml", "pretrain", "finetune"]) == 0  # they are done


def test_only_addresses_and_the_pile_itself_are_remote(tmp_path, monkeypatch):
    """Text of one's own that is called like the Pile is no download, and its size and changes are known."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pile_clean"
    folder.mkdir()
    written(folder, "x" * 3_000_000, "a.txt")

    def stages(text):
        config = written(tmp_path, f"DATASET: {{input: {text}}}\nFINETUNE: {{ENABLED: False}}")
        return {stage.name: stage for stage in plan(read_pipeline(config), Path("out"))}

    for local in ("pile_clean/*.txt", "pile_clean"):
        found = stages(local)
        assert "data" not in found and found["tokenizer"].basis == "3 MB of text" and found["tokenizer"].seconds > 20
        ((path, size, _),) = found["tokenizer"].inputs
        assert (path, size) == ("pile_clean/a.txt", 3_000_000)
        settings = found["tokenizer"].settings
        written(folder, "y" * 3_000_000, "a.txt")
        assert stages(local)["tokenizer"].settings != settings
    for remote in ("pile", "https://example.org/a.txt", "HTTP://example.org/a.txt"):
        found = stages(remote)
        assert " download --input " in str(found["data"].commands[0])
        assert found["tokenizer"].inputs == [] and found["tokenizer"].seconds is None
    folder.rename("pile")
    assert "data" not in stages("pile") and stages("pile")["tokenizer"].basis == "3 MB of text"


def test_a_stage_that_is_done_says_so_when_it_is_named(tmp_path, monkeypatch, capsys):
    """One for which the YAML has nothing to do is refused."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path, SMALL.replace("tasks: follows", "tasks: rte"))
    (tmp_path / "glue_data" / "RTE").mkdir(parents=True)
    for _ in range(2):
        assert main(["own.yaml", "data"]) == 0
        assert "== data: done already" in capsys.readouterr().out
    written(tmp_path, SMALL.replace("tasks: follows", "ENABLED: False, tasks: rte"))
    with pytest.raises(UserError, match="stage data has nothing to do by own.yaml"):
        main(["own.yaml", "data"])


# ---- Stages --------------------------------------------------------------------------------------------------------


def shell_stage(out, name, script, **more):
    return Stage(name, "a test", (Command(("bash", "-c", script)),), out / name, 1.0, **more)


@pytest.fixture
def pipeline_folder(tmp_path):
    (tmp_path / "logs").mkdir()
    return tmp_path


def run(stage, out, stop=None):
    return run_stage(stage, out, Stamps(out), {"PATH": "/usr/bin:/bin"}, stop or StopSignals())


def test_a_stage_is_done_once_and_a_failed_one_goes_on(pipeline_folder, capfd):
    out = pipeline_folder
    stage = shell_stage(out, "one", f"echo hello; [[ -e {out}/two ]] || exit 2")
    assert run(stage, out) == 2 and not Stamps(out).is_done(stage)
    said = capfd.readouterr()
    assert "hello" in said.out and "error: stage one ended with code 2" in said.err and said.err.count("\n") == 2
    later = shell_stage(out, "two", f"touch {out}/two")
    with pytest.raises(UserError, match="stage two needs one, which is not done"):
        refuse_gaps([stage, later], [later], Stamps(out))
    assert run(later, out) == 0 and run(stage, out) == 0
    assert Stamps(out).is_done(stage) and Stamps(out).state(stage) == "done"
    refuse_gaps([stage, later], [later], Stamps(out))
    log = (out / "logs" / "one.log").read_text()
    assert log.count("hello\n") == 2 and log.count(f"$ {stage.commands[0]}\n") == 2


def test_changed_settings_are_refused_or_taken_away_with_what_follows(pipeline_folder):
    out = pipeline_folder
    stages = [shell_stage(out, name, f"echo {name} --rate 1 > {out}/{name}") for name in ("a", "b", "c")]
    assert [run(stage, out) for stage in stages] == [0, 0, 0]
    changed = [stages[0], shell_stage(out, "b", f"echo b --rate 2 > {out}/b"), stages[2]]
    stamps = Stamps(out)
    stamps.settle_changes(stages, overwrite=False)
    with pytest.raises(UserError, match="stage b was made with other settings: --rate 1 .now 2.; --overwrite_output"):
        stamps.settle_changes(changed, overwrite=False)
    assert stamps.state(changed[1]) == "was made with other settings"
    stamps.settle_changes(changed, overwrite=True)
    assert [stamps.is_done(stage) for stage in changed] == [True, False, False]
    assert [(out / name).exists() for name in "abc"] == [True, False, False]
    text = [shell_stage(out, "a", f"echo a --rate 1 > {out}/a", inputs=[["text.txt", 3, 5]])]
    with pytest.raises(UserError, match="stage a was made with other settings: its text has changed"):
        stamps.settle_changes(text, overwrite=False)


FETCHED = """
SYSTEM: {NUM_GPUS: 0}
DATASET: {input: TEXT}
PRETRAIN: {model_size: tiny, max_train_steps: 1}
FINETUNE: {tasks: [rte, mrpc], data_dir: glue}
"""


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The data stage of a YAML, planned anew for each call, whose commands note how they are called."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "scripts").mkdir()
    monkeypatch.setattr("common.pipeline.plan.REPOSITORY", tmp_path)
    (tmp_path / "prepare_pile_data.py").write_text("print('called download')")
    fetch = '[[ $1 != "$BROKEN" ]] || exit 1; echo called $1; mkdir -p $2/${1^^}'
    (tmp_path / "scripts" / "download_finetune_dataset.sh").write_text(fetch)

    def call(text=FETCHED, broken="none"):
        """Settle, and run what is to be run. Returns: ([what was called], exit code)."""
        (stage,) = [one for one in plan(read_pipeline(written(tmp_path, text)), tmp_path) if one.name == "data"]
        stamps, log = Stamps(tmp_path), tmp_path / "logs" / "data.log"
        stamps.settle_changes([stage], overwrite=False)
        log.unlink(missing_ok=True)
        env = {"PATH": "/usr/bin:/bin", "BROKEN": broken}
        code = 0 if stamps.is_done(stage) else run_stage(stage, tmp_path, stamps, env, StopSignals())
        assert stamps.is_done(stage) == (code == 0)
        assert stamps.state(stage) == ("" if code else "done")
        return re.findall("^called (.*)$", log.read_text() if log.exists() else "", re.MULTILINE), code

    return call


def test_data_that_is_fetched_where_it_is_absent_is_no_setting(data, tmp_path):
    """Download of the text is; the tasks' folders show by themselves what there is."""
    remote = FETCHED.replace("TEXT", "https://example.org/text.txt")
    assert data(remote, broken="mrpc") == (["download", "rte"], 1)
    assert data(remote) == (["download", "mrpc"], 0)  # goes on, and plans the same though there is more than before
    assert data(remote) == ([], 0)
    shutil.rmtree(tmp_path / "glue" / "RTE")
    assert data(remote) == (["rte"], 0)
    assert data(remote) == ([], 0)
    with pytest.raises(UserError, match="stage data was made with other settings: --input https://example.org/text"):
        data(remote.replace("text.txt", "other.txt"))


def test_data_that_was_there_before_needs_no_fetching(data, tmp_path):
    for folder in ("RTE", "MRPC"):
        (tmp_path / "glue" / folder).mkdir(parents=True)
    assert data() == ([], 0)
    assert data(FETCHED.replace("TEXT", "http://example.org/text.txt")) == (["download"], 0)


def test_data_that_was_copied_by_hand_after_a_failure_ends_its_stage(data, tmp_path):
    assert data(broken="mrpc") == (["rte"], 1)
    (tmp_path / "glue" / "MRPC").mkdir()
    assert data() == ([], 0) and Stamps(tmp_path).read(Stage("data", "", (), tmp_path, None))["finished"]


def test_all_of_glue_is_fetched_where_a_folder_is_absent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = written(tmp_path, FETCHED.replace("tasks: [rte, mrpc], ", ""))
    (stage,) = [one for one in plan(read_pipeline(config), tmp_path) if one.name == "data"]
    (command,) = stage.commands
    assert command.words[-2:] == ("all", "glue") and not Stamps(tmp_path).is_done(stage)
    for task in TASKS.values():
        (tmp_path / "glue" / task.folder).mkdir(parents=True)
    assert Stamps(tmp_path).is_done(stage)


def test_a_stage_of_an_earlier_version_is_refused_with_what_it_ran(data, tmp_path):
    commands = ["bash scripts/download_finetune_dataset.sh rte glue"]
    stamp = {"settings": {"commands": commands, "inputs": []}, "seconds": 1.0, "finished": "2026-11-22 10:00:00"}
    (tmp_path / "stamps").mkdir()
    (tmp_path / "stamps" / "data.json").write_text(json.dumps(stamp))
    with pytest.raises(UserError, match="data was made with other settings: without bash scripts/download_finetune"):
        data()


def test_a_signal_ends_the_stage_and_what_outlives_a_pipeline_is_waited_for(pipeline_folder, capfd):
    out = pipeline_folder
    slow = shell_stage(out, "slow", f"trap 'echo saved > {out}/saved; exit 1' TERM; touch {out}/up; sleep 60 & wait")

    class Told(StopSignals):  # a signal that comes when the stage is up
        requested = property(lambda self: signal.SIGTERM if (out / "up").exists() else 0)

    assert run(slow, out, Told()) == 143 and (out / "saved").read_text() == "saved\n"
    assert not Stamps(out).is_done(slow) and "the same command continues" in capfd.readouterr().out
    log = out / "logs" / "late.log"
    with open(log, "ab") as lock:
        orphan = subprocess.Popen(["bash", "-c", "exec sleep 1"], stdout=lock)
        assert lock_log(lock)
    began = time.monotonic()
    assert run(shell_stage(out, "late", "true"), out) == 0
    assert orphan.poll() == 0 and time.monotonic() - began > 0.5
    assert "a process of an earlier call still writes to" in capfd.readouterr().out


# ---- Collection ----------------------------------------------------------------------------------------------------


def test_what_a_sweep_has_scored(tmp_path):
    scores = {("rte", 1): 0.6, ("rte", 2): 0.5, ("rte", 3): 0.66, ("mrpc", 1): (0.8, 0.7), ("mrpc", 2): (0.9, 0.8)}
    found = []
    for (task, seed), score in scores.items():
        names = ("accuracy",) if task == "rte" else ("accuracy", "f1")
        metrics = dict(zip(names, score if task == "mrpc" else (score,), strict=True))
        found.append(RunResult(GlueRun(task, 4e-5, 16, 5.0, seed, f"{task}/{seed}"), FINISHED, metrics))
    found.append(RunResult(GlueRun("mrpc", 4e-5, 16, 5.0, 3, "mrpc/3"), DIVERGED, message="nan"))
    write_summary(tmp_path, "a sweep", found, {"rte": {"accuracy": 0.53}, "mrpc": {"accuracy": 0.68, "f1": 0.81}}, [])
    rte, mrpc = collect(tmp_path)["tasks"]
    assert rte["median"] == pytest.approx(0.6) and rte["sd"] == pytest.approx(stdev([0.6, 0.5, 0.66]))
    assert rte["baseline"] == {"name": "the most frequent label", "score": pytest.approx(0.53)}
    assert mrpc["scores"] == {"1": pytest.approx(0.75), "2": pytest.approx(0.85)} and mrpc["ended_badly"] == 1
    assert collect(tmp_path)["average"] == pytest.approx((0.6 + 0.8) / 2) and "mnli" in collect(tmp_path)["missing"]


# ---- All of it -----------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_a_pipeline_that_is_killed_goes_on_and_ends_with_report_and_zip(harness, tmp_path):
    """The whole command, with the machine's own environment; about two minutes."""
    config = written(tmp_path, SMALL)
    words = ["bash", REPOSITORY / "scripts" / "run_pipeline.sh", config]
    killed = harness.start_command(*words, cwd=tmp_path)
    pretrained = tmp_path / "runs" / "own" / "pretrain"
    wait_for_step(killed, pretrained, 12, timeout=300)
    killed.kill_group()
    done = harness.command(*words, cwd=tmp_path, timeout=900).check()
    out = tmp_path / "runs" / "own"
    assert "== tokenizer: done already" in done.stdout and "glue.zip: fit to hand in: 11 files" in done.stdout
    assert results(pretrained)["train_steps"] == 60
    page = Page((out / "report.html").read_text()).text
    assert f"{results(pretrained)['eval_loss']:.3f}" in page and "follows" in page
    with_key = [path for path in out.rglob("*") if path.is_file() and b"a-key-for-no-file" in path.read_bytes()]
    assert not with_key
    again = harness.command(*words, cwd=tmp_path, timeout=300).check()
    assert [f"== {name}: done already" in again.stdout for name in STAGES[1:-1]] == [True] * 6
    config.write_text(SMALL.replace("seeds: [7]", "seeds: [8]"))
    refused = harness.command(*words, cwd=tmp_path).check(2)
    assert "stage finetune was made with other settings" in refused.stderr
    assert "Traceback" not in refused.stderr
