"""Planned pipelines as runs: the command of each, and what the first of them really take on this machine."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from common.errors import UserError
from common.logged_process import last_line
from common.memory import GB
from common.memory_plan import aligned
from common.parallel.stage_map import MODULES, RANKS
from common.run_folder import RESULTS

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = Path("runs/plan")  # of the runs that are measured
MEASURED_RUNS, MEASURED_STEPS = 3, 10
CONF = "conf.json"
YAMLS = {"data parallel": "ddp", "none": "pipeline_gpipe"}  # others: pipeline_<schedule>


def launch_words(plan, hardware, machines=None):
    """accelerate's part of the command that runs a plan, behind "accelerate launch".

    Args:
        plan: common.pipeline_plan.Candidate; hardware: Hardware; machines: their number, None for as many of the
            table's as make up the devices.
    Returns:
        list of words.
    """
    devices = plan.depth * plan.width
    machines = machines or -(-devices // hardware.devices_per_machine)
    yaml = YAMLS.get(plan.schedule, f"pipeline_{plan.schedule}")
    words = ["--config_file", f"accelerate_configs/{yaml}.yaml", "--num_processes", str(devices)]
    precision = {"fp32": "no"}.get(hardware.precision, hardware.precision)
    if precision == "fp16" and plan.depth > 1:
        precision = "bf16"  # the table is of PipeDream's stages; ours do not scale a loss
    words += ["--mixed_precision", precision]
    if machines > 1:
        words += ["--num_machines", str(machines), "--machine_rank", "K", "--main_process_ip", "NODE0"]
        words += ["--main_process_port", "29500"]
    if plan.depth > 1:
        schedule, at_once = _in_pipe(plan)
        words += ["--role", f"pipeline schedule={schedule} stages={plan.depth} micro_batches={at_once}"]
    return words


def script_words(plan, command, stage_map=False):
    """The script's part of it.

    Args:
        plan: Candidate; command: script and flags, as common.plan.describe gave them; stage_map: whether the ranks of
            the stages are those of CONF.
    Returns:
        list of words.
    """
    per_device = plan.rows * (_in_pipe(plan)[1] if plan.depth > 1 else 1)
    batch = plan.width * plan.rows * plan.micro_batches
    words = [*shlex.split(command), "--per_device_train_batch_size", str(per_device), "--train_batch_size", str(batch)]
    words += ["--gradient_checkpointing"] * plan.recompute
    return words + ["--pipeline_config", CONF] * stage_map


def _in_pipe(plan):
    """(schedule of the YAML's role, micro-batches that go through the stages together)."""
    return ("gpipe", 1) if plan.schedule == "none" else (plan.schedule, plan.micro_batches)


def format_command(plan, command, hardware, neighbours):
    """The command of a plan, as lines to print.

    Args:
        plan, command, hardware: as launch_words and script_words; neighbours: as common.pipeline_plan.candidates.
    """
    devices = plan.depth * plan.width
    apart = devices > hardware.devices_per_machine
    by_copies = neighbours == "copies" and apart and plan.depth > 1 and plan.width > 1
    words = launch_words(plan, hardware) + script_words(plan, command, by_copies)
    lines = ["the fastest" + (", on each machine, with its number from 0 on for K:" if apart else ":")]
    lines.append("  accelerate launch " + shlex.join(words))
    if by_copies:
        ranks = {str(stage): [stage * plan.width + copy for copy in range(plan.width)] for stage in range(plan.depth)}
        conf = {MODULES: [*range(plan.depth), plan.depth - 1], RANKS: ranks}
        lines += [f"with {CONF}:", f"  {json.dumps(conf)}"]
    return "\n".join(lines)


def measure(plan, number, command, hardware, flags):
    """Run a plan on this machine for a few steps.

    Args:
        plan: Candidate; number: of it, for its folder in FOLDER; command, hardware: as launch_words and script_words;
            flags: more of the script's.
    Returns:
        dict, all_results.json of the run.
    Raises:
        UserError: it has failed.
    """
    folder = FOLDER / f"{number}_{plan.schedule.replace(' ', '_')}_{plan.depth}x{plan.width}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in (RESULTS, "log.txt"):
        (folder / name).unlink(missing_ok=True)
    flag, yaml, *launcher = launch_words(plan, hardware, machines=1)
    script, *words = script_words(plan, command)
    run = [sys.executable, "-m", "accelerate.commands.launch", flag, str(REPOSITORY / yaml), *launcher]
    run += [str(REPOSITORY / script), *words, *flags, "--throughput_steps", str(MEASURED_STEPS)]
    run += ["--output_dir", str(folder / "run"), "--overwrite_output_dir"]
    log = folder / "log.txt"
    with open(log, "w") as file:
        code = subprocess.run(run, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT).returncode
    results = folder / "run" / RESULTS
    if code or not results.exists():
        said = [line for line in log.read_text().splitlines() if "rror: " in line]
        raise UserError(f"--verify: {log} ended with code {code}: {(said or [last_line(log.read_text())])[0]}")
    return json.loads(results.read_text())


def format_measured(plans, found):
    """Predicted against measured, as lines to print. Args: plans: of Candidate; found: what measure() returned."""
    head = ["schedule", "stages", "copies", "micro-batch", "micro-batches", "recompute"]
    table = [[*head, "rows/s", "measured", "ratio", "idle", "measured", "GB", "measured"]]
    for plan, result in zip(plans, found, strict=True):
        shape = [
            plan.schedule,
            plan.depth,
            plan.width,
            plan.rows,
            plan.micro_batches,
            "yes" if plan.recompute else "no",
        ]
        speed, share = result["samples_per_second"], result.get("bubble_share")
        row = [*shape, f"{plan.rows_per_second:,.1f}", f"{speed:,.1f}", f"{speed / plan.rows_per_second:.2f}"]
        row += [f"{plan.idle:.0%}", "-" if share is None else f"{share:.0%}"]
        table.append([*row, f"{plan.memory / GB:.2f}", f"{result['peak_memory_bytes'] / GB:.2f}"])
    said = f"measured over {MEASURED_STEPS} steps, each beside what was predicted; logs and timelines: {FOLDER}"
    return "\n".join([said, *aligned(table)])
