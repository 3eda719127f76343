"""docs/migrating.md: each of our commands is read by every program that it starts, as that would read it."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from common import plan
from common.arguments import parse_pretraining_arguments
from common.clm_arguments import parse_clm_arguments
from common.data.glue import TASKS
from common.glue import submission
from common.glue.sweep import parse_sweep_arguments
from common.glue_arguments import parse_glue_arguments
from common.pipeline.config import read_pipeline
from common.prepare.arguments import parse_command
from harness import REPOSITORY
from pretraining import BERT_CONFIG
from stub_shell import Shell

PAGE = (REPOSITORY / "docs/migrating.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
CONFIGS = REPOSITORY / "accelerate_configs"


def convert_words(words):
    """common.convert_checkpoint wants a checkpoint that is there: only their number is looked at."""
    assert len(words) in (2, 3)


def submission_words(words):
    """Read by its parser, which takes the program's own words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["submission", *words])
        submission.parse_arguments()


READERS = {
    "run_pretraining.py": parse_pretraining_arguments,
    "run_clm.py": parse_clm_arguments,
    "run_glue.py": parse_glue_arguments,
    "prepare_pile_data.py": parse_command,
    "common.glue.sweep": parse_sweep_arguments,
    "common.glue.submission": submission_words,
    "common.convert_checkpoint": convert_words,
    "common.pipeline.run": lambda words: read_pipeline(Path(words[0])),
    "common.plan": plan.main,
}
HELPERS = ("common.data.hub", "common.seed_table")  # that scripts start besides


def read(argv):
    """Let a program read its words. Args: argv: Python's. Returns: the programs' names."""
    if argv[:2] == ["-m", "accelerate.commands.launch"]:
        launched = launch_command_parser().parse_args(argv[2:])
        config = Path(launched.config_file)
        assert (CONFIGS / config.name).is_file(), f"{config.name} is not there"
        return read([launched.training_script, *launched.training_script_args])
    program, words = (argv[1], argv[2:]) if argv[0] == "-m" else (Path(argv[0]).name, argv[1:])
    if program not in HELPERS:
        READERS[program](words)
    return [program]


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """A repository with a stub instead of Python, all scripts, and what the page's commands name."""
    shell = Shell(tmp_path)
    for path in (REPOSITORY / "scripts").iterdir():
        if path.name != "setup.sh":
            shutil.copy(path, shell.repository / "scripts")
    for path in REPOSITORY.glob("*.py"):
        (shell.repository / path.name).touch()
    shutil.copytree(REPOSITORY / "configs", shell.here / "configs")
    (shell.here / "PREPARED").mkdir()
    (shell.here / "PREPARED" / "train.bin").touch()
    (shell.here / "bert_config.json").write_text(json.dumps(BERT_CONFIG))
    monkeypatch.chdir(shell.here)
    return shell


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split()[:3]))
def test_a_command_of_ours(shell, command):
    first, second, *words = shlex.split(command.replace("NODE0", "localhost"))
    if first == "bash":
        shell.script = second.removeprefix("scripts/")
        assert (REPOSITORY / second).is_file()
        if shell.script == "download_finetune_dataset.sh":  # which would download
            assert words[0] in TASKS and len(words) == 2
            return
        process = shell.start(*words)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 0, said
        started = [program for call in shell.started() for program in read(call["argv"])]
        assert started or shell.script == "setup.sh"
    elif first == "accelerate":
        assert second == "launch" and read(["-m", "accelerate.commands.launch", *words])
    else:
        assert first == "python" and (REPOSITORY / second).is_file() and read([second, *words])


def test_the_commands_are_found():
    assert len(COMMANDS) > 30


@pytest.mark.parametrize(
    "flag",
    # of PipeDream's commands, those that mean the same here
    ["--num_minibatches", "--bert_config_path", "--vocab_path", "--train_path", "--checkpoint_dir", "--learning_rate"]
    + ["--config_path"],
)
def test_pipedreams_names_are_used(flag):
    theirs = [block for block in re.findall(r"```text\n(.*?)```", PAGE, re.S) if "main_with_runtime.py" in block]
    assert any(flag in block for block in theirs) and any(flag in command for command in COMMANDS)
