"""From the planner's plans to runs: their commands, and what --verify measures."""

import json
import random
import re
import shlex
from dataclasses import replace

import pytest
from accelerate.commands.launch import launch_command_parser

from common.arguments import parse_pretraining_arguments
from common.errors import UserError
from common.memory import GB
from common.parallel import check_micro_batches, launched_data_ranks
from common.parallel.launch import launched_pipe
from common.pipeline_plan import candidates
from common.pipeline_runs import format_command, measure
from common.profile import devices_here
from harness import REPOSITORY
from plans import HARDWARE, V100, WORKLOAD, found


def read_command(line, monkeypatch):
    """What accelerate, and the script that it starts, make of a command. Returns: (launcher's, script's arguments)."""
    words = shlex.split(line.replace("--machine_rank K", "--machine_rank 0"))
    launcher = launch_command_parser().parse_args(words[2:])
    monkeypatch.setenv("WORLD_SIZE", str(launcher.num_processes))
    monkeypatch.setenv("ROLE_NAME", launcher.role)
    assert words[:2] == ["accelerate", "launch"] and (REPOSITORY / launcher.config_file).is_file()
    return launcher, parse_pretraining_arguments(launcher.training_script_args)[2]


@pytest.mark.parametrize("devices", [2, 4])
def test_a_command_runs_its_plan(monkeypatch, devices):
    plans = candidates(WORKLOAD, HARDWARE, devices, 64)
    for plan in random.Random(0).sample(plans, 20):
        line = format_command(plan, "run_pretraining.py --model_size tiny", HARDWARE, "stages").splitlines()[1]
        launcher, args = read_command(line, monkeypatch)
        ranks, pipe = launched_data_ranks(), launched_pipe()
        per_device, accumulation = args.batch_ramp.cut(args.per_device_train_batch_size, ranks)
        check_micro_batches(pipe, per_device, accumulation)
        assert launcher.num_processes == devices and launcher.mixed_precision == "bf16" and ranks == plan.width
        assert ranks * per_device * accumulation == 64 and per_device // pipe.micro_batches == plan.rows
        assert pipe.stages == plan.depth and args.gradient_checkpointing == plan.recompute
        assert (accumulation == 1) == (plan.schedule in ("2bw", "1f1b", "gpipe") or plan.micro_batches == 1)
        schedule = {"none": "gpipe", "data parallel": "none"}.get(plan.schedule, plan.schedule)
        assert pipe.schedule == schedule and launcher.config_file.endswith(
            "ddp.yaml" if plan.depth == 1 else f"pipeline_{schedule}.yaml"
        )


def test_the_command_for_several_machines_and_their_ranks(monkeypatch, tmp_path):
    """Two machines of four devices; where a stage's copies are neighbours, its ranks are PipeDream's."""
    plan = found("2bw", 4, 2, recompute=False)
    said, line = format_command(plan, "run_pretraining.py", HARDWARE, "stages").splitlines()
    launcher, _ = read_command(line, monkeypatch)
    assert "on each machine" in said and (launcher.num_machines, launcher.num_processes) == (2, 8)
    _, line, said, conf = format_command(plan, "run_pretraining.py", HARDWARE, "copies").splitlines()
    _, args = read_command(line, monkeypatch)
    (tmp_path / args.pipeline_config).write_text(conf)
    pipe = launched_pipe(tmp_path / args.pipeline_config)
    assert said == "with conf.json:" and pipe.stage_map.ranks == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert (pipe.stages, pipe.micro_batches) == (4, plan.micro_batches) and pipe.layers(8)[3] == range(6, 8)


def test_a_table_in_fp16_gives_commands_that_run(monkeypatch):
    """Our stages run in bf16; one process, or copies of the model, in fp16, too."""
    plans, table = candidates(WORKLOAD, HARDWARE, 4, 64), replace(HARDWARE, precision="fp16")
    for deep, precision in ((True, "bf16"), (False, "fp16")):
        plan = next(plan for plan in plans if (plan.depth > 1) == deep)
        line = format_command(plan, "run_pretraining.py", table, "stages").splitlines()[1]
        assert read_command(line, monkeypatch)[0].mixed_precision == precision


def test_the_first_plans_are_run(harness, tiny_corpus, tmp_path):
    """As users start it; on two cores, with the tiny model."""
    if devices_here() < 2:
        pytest.skip("a machine with one device")
    (tmp_path / "hardware.yaml").write_text((REPOSITORY / V100).read_text().replace("bf16", "fp32"))
    words = ["tiny", 2, 4, 8, 32, "--train_batch_size", 16, "--schedule", "2bw", "--hardware", "hardware.yaml"]
    script = REPOSITORY / "scripts/plan.sh"
    ran = harness.command("bash", script, *words, "--verify", "--train_file", tiny_corpus, cwd=tmp_path).check()
    plan, measured = ran.stdout.split("measured over 10 steps")
    assert "accelerate launch --config_file accelerate_configs/" in plan
    predicted = [line.split() for line in plan.splitlines() if re.match("  (2bw|data)", line)]
    rows = [line.split() for line in measured.splitlines() if re.match("  (2bw|data)", line)]
    assert [row[0] for row in rows] == [row[0] for row in predicted] and {row[0] for row in rows} == {"2bw", "data"}
    for number, row in enumerate(rows, 1):
        (results,) = tmp_path.glob(f"runs/plan/{number}_*/run/all_results.json")
        found = json.loads(results.read_text())
        assert found["world_size"] == 2 and found["precision"] == "fp32" and found["train_steps"] == 15
        assert f"{found['samples_per_second']:,.1f}" in row and f"{found['peak_memory_bytes'] / GB:.2f}" == row[-1]
        if row[0] == "2bw":
            assert "PipeDream-2BW, 2 stages" in found["strategy"] and f"{found['bubble_share']:.0%}" in row


def test_a_run_that_fails_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("import sys\nsys.exit('error: cannot read no.txt: name a text')\n")
    (plan,) = (p for p in candidates(WORKLOAD, HARDWARE, 1, 2, most_rows=2) if p.rows == 2 and not p.recompute)
    with pytest.raises(UserError, match="1_data_parallel_1x1/log.txt ended with code .*no.txt") as caught:
        measure(plan, 1, f"{tmp_path / 'broken.py'} --model_size tiny", HARDWARE, ["--train_file", "no.txt"])
    assert "\n" not in str(caught.value)
