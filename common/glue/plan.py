"""Which runs of run_glue.py make up a sweep: tasks x configurations x seeds, by a named protocol."""

from dataclasses import dataclass
from pathlib import Path

from common.data.glue import DIAGNOSTIC, TASKS, find_task, task_folder
from common.data.glue_splits import absent_files
from common.errors import UserError
from common.glue_arguments import GlueDataArguments

LARGE = ("mnli", "qqp", "qnli")  # more than 100,000 training rows
FROM_MNLI = ("rte", "mrpc", "stsb")  # Liu et al. 2019 (RoBERTa, arXiv:1907.11692), section 5.1
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Grid:
    """The values of a task's hyperparameters, every combination of which is a configuration."""

    learning_rates: tuple[float, ...]
    train_batch_sizes: tuple[int, ...]
    num_train_epochs: tuple[float, ...]


@dataclass(frozen=True)
class Protocol:
    """A way to fine-tune that has a name, so that two tables can be compared.

    small, large: the grids of the tasks, by their size; flags: of run_glue.py, for every run; seeds: how many.
    """

    small: Grid
    large: Grid
    flags: tuple[str, ...]
    seeds: int

    def grid(self, task):
        """The Grid of a task, given by name."""
        return self.large if task in LARGE else self.small


_SANE = Grid((4e-5,), (16,), (5,))
PROTOCOLS = {
    # One configuration for all tasks: Geiping & Goldstein 2023 (Cramming, arXiv:2212.14034), their GLUE_sane.
    "sane": Protocol(
        _SANE,
        _SANE,
        tuple(
            "--lr_scheduler_type cosine --warmup_ratio 0.1 --weight_decay 0 --max_grad_norm 0 --adam_beta2 0.98 "
            "--adam_epsilon 1e-6 --max_seq_length 128".split()
        ),
        5,
    ),
    # A search for each task, 156 runs: ExtremeBERT's, Pan et al. 2022 (arXiv:2211.17201).
    "grid": Protocol(
        Grid((1e-5, 3e-5, 5e-5, 8e-5), (16, 32), (3, 5, 10)),
        Grid((5e-5, 8e-5), (32,), (3, 5)),
        tuple("--lr_scheduler_type polynomial --warmup_ratio 0.06 --weight_decay 0.1 --max_seq_length 128".split()),
        1,
    ),
}


@dataclass(frozen=True)
class Run:
    """One call of run_glue.py."""

    task: str
    learning_rate: float
    train_batch_size: int
    num_train_epochs: float
    seed: int
    folder: str  # below that of the sweep

    @property
    def configuration(self):
        """What it has in common with the same task's runs of other seeds."""
        return self.learning_rate, self.train_batch_size, self.num_train_epochs

    @property
    def name(self):
        """For messages."""
        return self.folder.replace("/", " ")


def plan_runs(protocol, tasks, seeds, learning_rates=None, train_batch_size=None, num_train_epochs=None):
    """The runs of a sweep, task by task.

    Args:
        protocol: a key of PROTOCOLS; tasks: names; seeds: list of int.
        learning_rates: list of float; train_batch_size: int; num_train_epochs: float; None = the protocol's.
    Returns:
        list of Run.
    """
    runs = []
    for task in tasks:
        grid = PROTOCOLS[protocol].grid(task)
        several = len(grid.train_batch_sizes) * len(grid.num_train_epochs) > 1
        for rate in learning_rates or grid.learning_rates:
            for batch in [train_batch_size] if train_batch_size else grid.train_batch_sizes:
                for epochs in [num_train_epochs] if num_train_epochs else grid.num_train_epochs:
                    more = f"-batch{batch}-epochs{epochs:g}" if several else ""
                    for seed in seeds:
                        folder = f"{task}/lr{rate:g}{more}-seed{seed}"
                        runs.append(Run(task, rate, batch, epochs, seed, folder))
    return runs


def read_seeds(text, default):
    """Seeds as they are given: how many (3 means 1, 2, 3), or with a comma themselves ("1234,1235", "7,").

    Args:
        text: str or None; default: how many.
    Raises:
        UserError: neither.
    """
    if text is None:
        return list(range(1, default + 1))
    words = [word for word in text.split(",") if word]
    if not words or not all(word.isdecimal() and int(word) < 2**32 for word in words):
        raise UserError(f"seeds '{text}': give how many, as 5, or the seeds themselves, as 1234,1235")
    if "," in text:
        return list(dict.fromkeys(map(int, words)))
    if not 1 <= int(text) <= MOST_SEEDS:
        raise UserError(f"seeds {text}: give 1 to {MOST_SEEDS}, or the seed itself with a comma behind it, as {text},")
    return list(range(1, int(text) + 1))


def tasks_with_data(tasks, data_dir, splits):
    """Those of some tasks whose files lie in their own folders below the GLUE root.

    Args:
        tasks: names; data_dir: the root, or a task's own folder; splits: of "train", "validation", "test".
    Raises:
        UserError: no such folder.
    """
    return [task for task in tasks if _has_data(find_task(task), data_dir, splits)]


def _has_data(task, data_dir, splits):
    if task_folder(task, data_dir).resolve().name.lower() != task.folder.lower():
        return False
    return not absent_files(GlueDataArguments(task_name=task.name, data_dir=data_dir), splits)


def read_tasks(words):
    """Task names as they are given, with commas or without; all of them where none is given.

    Raises:
        UserError: an unknown task, or the diagnostic set, for which nothing is trained.
    """
    names = [find_task(name).name for word in words for name in word.split(",") if name]
    if DIAGNOSTIC.name in names:
        raise UserError(f"task {DIAGNOSTIC.name} is not trained for: name mnli, whose runs predict it, too")
    return list(dict.fromkeys(names)) or list(TASKS)


def is_local(checkpoint):
    """Whether a checkpoint's name can only be a path: it exists, or no name on the hub looks like it."""
    path = Path(checkpoint).expanduser()
    parts = path.parts
    return path.exists() or len(parts) > 2 or checkpoint.startswith((".", "/", "~")) or Path(parts[0]).is_dir()
