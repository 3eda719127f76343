"""A pipeline's YAML, in ExtremeBERT's layout, read strictly: a misspelt key is an error, not a default.

Keys in capitals are ExtremeBERT's, and a few of ours; those in small letters are flags of the scripts.
"""

import difflib
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from common.arguments import GROUPS
from common.errors import UserError, first_line
from common.flags import flag_names
from common.glue.sweep import SweepArguments
from common.glue_arguments import GlueDataArguments, GlueModelArguments, GlueTrainingArguments
from common.prepare.arguments import PrepareArguments

NUMBER = (int, float)
GLUE_GROUPS = (GlueModelArguments, GlueDataArguments, GlueTrainingArguments)
KEYS = {
    "SYSTEM": {"NUM_GPUS": int, "MAX_MEMORY_IN_GB": NUMBER, "ACCELERATE_CONFIG": str},
    "WANDB": {"API_KEY": str},
    "DATASET": {
        "ENABLED": bool,
        "EMBEDDED": bool,
        "HUGGINGFACE_DATASETS": list,
        "CUSTOMIZED_DATASETS": list,
        "ID": str,
        "TMP_DIR": str,
        "OUTPUT_DIR": str,
        "LOG_DIR": str,
    },
    "TOKENIZER": {"NAME_OR_PATH": str},
    "PRETRAIN": {"ENABLED": bool, "OPTIMIZER": str, "NUM_STEPS": int, "LEARNING_RATE": NUMBER, "ID": str},
    "FINETUNE": {"ENABLED": bool, "MULTIPROCESS_GPU_LIST": list},
    "RESULT_COLLECTION": {"ENABLED": bool},
}
# Flags that the pipeline sets, and what to give instead.
ALWAYS_OURS = {
    "output_dir": "--output_dir of run_pipeline.sh",
    "overwrite_output_dir": "--overwrite_output_dir of run_pipeline.sh",
    "resume_from_checkpoint": "nothing, it always continues",
    "check_arguments": "--dry_run of run_pipeline.sh",
}
OF_THE_TEXT = dict.fromkeys(
    ("dataset_name", "dataset_config_name", "dataset_path", "train_file", "validation_file", "streaming"),
    "the section DATASET",
)
OURS = {
    "DATASET": {
        "output_dir": "OUTPUT_DIR",
        "overwrite_output_dir": ALWAYS_OURS["overwrite_output_dir"],
        "dataset_name": "HUGGINGFACE_DATASETS",
        "dataset_config_name": "HUGGINGFACE_DATASETS",
        "shard_index": "nothing, all shards are prepared",
        "tokenizer_name": "the section TOKENIZER",
        "tokenizer_type": "the section TOKENIZER",
        "tokenizer_train_vocab_size": "the section TOKENIZER",
    },
    "TOKENIZER": {},
    "PRETRAIN": ALWAYS_OURS
    | OF_THE_TEXT
    | dict.fromkeys(("tokenizer_name", "tokenizer_train_vocab_size"), "the section TOKENIZER"),
    "FINETUNE": ALWAYS_OURS
    | OF_THE_TEXT
    | {
        "task_name": "tasks",
        "seed": "seeds",
        "test_file": "data_dir",
        "do_train": "nothing, it is set",
        "do_eval": "nothing, it is set",
        "config_file": "SYSTEM.ACCELERATE_CONFIG",
        "devices": "SYSTEM.NUM_GPUS",
        "num_processes": "MULTIPROCESS_GPU_LIST",
    },
}
FLAGS = {
    "DATASET": flag_names([PrepareArguments]),
    "TOKENIZER": ["--tokenizer_type", "--tokenizer_train_vocab_size"],
    "PRETRAIN": flag_names(GROUPS),
    "FINETUNE": sorted({*flag_names([SweepArguments]), *flag_names(GLUE_GROUPS)}),
}
# Dataset scripts, which ExtremeBERT names, are no longer run by the datasets library; these hold the same as files.
MOVED_DATASETS = {
    "wikipedia": ("wikimedia/wikipedia", {"20220301": "20231101"}),
    "bookcorpusopen": ("lucadiliello/bookcorpusopen", {"plain_text": "default"}),
}
# What its pipeline trains whatever the YAML says: run_pretraining.sh and pretrain_search.sh of ExtremeBERT.
EXTREMEBERT_PRETRAIN = {
    "model_size": "large",
    "encoder_ln_mode": "pre-ln",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "train_batch_size": 4096,
    "per_device_train_batch_size": 8,
    "lr_schedule": "step",
    "lr_scheduler_type": "elastic_step_decay",
    "warmup_proportion": 0.06,
    "max_grad_norm": 0.0,
    "weight_decay": 0.01,
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-6,
    "mlm_probability": 0.15,
    "logging_steps": 100,
}
EXTREMEBERT_OPTIMIZERS = {  # conf/optimizer_*.conf of ExtremeBERT
    "adamw": {"optimizer_type": "adamw"},
    "vanilla-sgd": {"optimizer_type": "sgd", "optimizer_args": ["momentum=0"]},
    "sgd-momentum": {"optimizer_type": "sgd", "optimizer_args": ["momentum=0.9"]},
}
EXTREMEBERT_STEPS, EXTREMEBERT_RATE = 23000, 1e-3
EXTREMEBERT_FINETUNE = {"protocol": "grid", "init_from_mnli": True}
GLUE_DIR = "glue_data"
FOLLOWS = "follows"  # the task that needs no data


@dataclass(frozen=True)
class Pipeline:
    """What a YAML asks for.

    path: of the YAML. sections: its keys in capitals, by section. flags: by section, for the scripts: {name: value},
    with ExtremeBERT's recipe where it is in force. datasets: (name, configuration or None) on the hub; folders: of
    text; embedded: the installed packages' documentation is the text. notes: lines that say what was translated.
    """

    path: Path
    sections: dict
    flags: dict
    datasets: list
    folders: list
    embedded: bool
    notes: list = field(default_factory=list)

    def enabled(self, section):
        """Whether a section's stages are to run."""
        return self.sections[section].get("ENABLED", True)

    @property
    def text(self):
        """What is trained on, in a phrase."""
        given = self.flags["DATASET"].get("input") or []
        named = [" ".join(filter(None, dataset)) for dataset in self.datasets]
        named += [*self.folders, *([given] if isinstance(given, str) else given)]
        return ", ".join(named) or "the documentation in the installed Python packages"

    @property
    def tasks(self):
        """Names as FINETUNE gives them; none for all of GLUE."""
        given = self.flags["FINETUNE"].get("tasks") or []
        return [given] if isinstance(given, str) else given

    @property
    def offline_task(self):
        """Whether what is fine-tuned is the task that needs no data."""
        return self.tasks == [FOLLOWS]


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would silently take the last."""

    def construct_mapping(self, node, deep=False):
        names = [self.construct_object(key) for key, _ in node.value]
        for name, (key, _) in zip(names, node.value, strict=True):
            if names.count(name) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {name} stands there twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def read_pipeline(path):
    """Read and judge a pipeline's YAML; nothing but the file is looked at.

    Args:
        path: Path.
    Returns:
        Pipeline.
    Raises:
        UserError: no such file, not YAML, an unknown key, a value of the wrong kind.
    """
    sections, flags = _split(path, _load(path))
    datasets, notes = _datasets(path, sections["DATASET"])
    folders = sections["DATASET"].get("CUSTOMIZED_DATASETS", [])
    if not all(isinstance(folder, str) for folder in folders):
        raise UserError(f"{path}: DATASET.CUSTOMIZED_DATASETS: give a list of folders")
    embedded = sections["DATASET"].get("EMBEDDED", False)
    others = bool(datasets or folders or flags["DATASET"].get("input"))
    if embedded and (others or flags["DATASET"]):
        raise UserError(f"{path}: DATASET.EMBEDDED stands alone: drop it, or the section's other keys")
    if not embedded and not others:
        raise UserError(
            f"{path}: DATASET names no text: give HUGGINGFACE_DATASETS, CUSTOMIZED_DATASETS, input, or EMBEDDED: True"
        )
    notes += _extremebert_pretrain(path, sections["PRETRAIN"], flags["PRETRAIN"])
    notes += _extremebert_finetune(sections["FINETUNE"], flags["FINETUNE"])
    for name in ("TMP_DIR", "LOG_DIR"):
        if name in sections["DATASET"]:
            notes.append(f"DATASET.{name} is ignored: everything lies in the pipeline's folder, logs too")
    pipeline = Pipeline(path, sections, flags, datasets, folders, embedded, notes)
    if FOLLOWS in pipeline.tasks and not pipeline.offline_task:
        raise UserError(f"{path}: FINETUNE.tasks: {FOLLOWS} stands alone, GLUE's tasks have a table of their own")
    return pipeline


def _load(path):
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({first_line(error)}): give a pipeline's YAML, as in configs/"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: {getattr(error, 'problem', None) or 'not YAML'}; correct it") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: holds no sections; they are {', '.join(KEYS)}")
    return loaded


def _split(path, loaded):
    """({section: {key in capitals: value}}, {section: {flag: value}}), each key and value judged."""
    sections, flags = {name: {} for name in KEYS}, {name: {} for name in KEYS}
    for section, content in loaded.items():
        if section not in KEYS:
            raise UserError(f"{path}: unknown section {section}: {_nearest(section, KEYS)}")
        if content is not None and not isinstance(content, dict):
            raise UserError(f"{path}: {section} is no section: put its keys below it, as in configs/")
        known_flags = [flag[2:] for flag in FLAGS.get(section, []) if "-" not in flag[2:] and flag != "--help"]
        for key, value in (content or {}).items():
            where = f"{path}: {section}.{key}"
            if key in KEYS[section]:
                sections[section][key] = _checked(where, value, KEYS[section][key])
            elif key in OURS.get(section, {}):
                raise UserError(f"{where} is the pipeline's to set: give {OURS[section][key]}")
            elif key in known_flags:
                flags[section][key] = _checked_flag(where, value)
            else:
                raise UserError(f"{where} is unknown: {_nearest(key, [*KEYS[section], *known_flags])}")
    return sections, flags


def _nearest(name, known):
    by_lower = {one.lower(): one for one in known}
    if near := difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.5):
        return f"did you mean {by_lower[near[0]]}?"
    return f"known are {', '.join(one for one in known if one.isupper()) or ', '.join(known)}"


def _checked(where, value, kind):
    if kind in (NUMBER, int) and isinstance(value, str):  # YAML takes 1e-3, without a dot, for text
        try:
            value = float(value)
        except ValueError:
            pass
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    names = {int: "a whole number", NUMBER: "a number", str: "text", bool: "True or False", list: "a list"}
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where}: {value} is not {names[kind]}")
    if kind in (NUMBER, int) and value < 0:
        raise UserError(f"{where}: {value} is below 0")
    return value


def _checked_flag(where, value):
    plain = (str, int, float, bool)
    if isinstance(value, plain) or (isinstance(value, list) and value and all(isinstance(v, plain) for v in value)):
        return value
    raise UserError(f"{where}: give a number, text, True or False, or a list of them")


def _datasets(path, section):
    """([(name on the hub, configuration or None)], notes)."""
    found, notes = [], []
    for item in section.get("HUGGINGFACE_DATASETS", []):
        if not isinstance(item, list) or not 1 <= len(item) <= 2 or not all(isinstance(word, str) for word in item):
            raise UserError(f"{path}: DATASET.HUGGINGFACE_DATASETS: {item} is not [name, subset]")
        name, config = item[0], item[1] if len(item) == 2 else None
        if name in MOVED_DATASETS:
            name, renamed = MOVED_DATASETS[name]
            for old, new in renamed.items():
                config = config and config.replace(old, new)
            notes.append(f"dataset {' '.join(item)} is read from {name} {config or ''}".rstrip())
        found.append((name, config))
    return found, notes


def _extremebert_pretrain(path, section, flags):
    """Put ExtremeBERT's recipe below the flags of a section in its names; one in ours has run_pretraining.py's."""
    if flags and not section.keys() & {"NUM_STEPS", "OPTIMIZER", "LEARNING_RATE"}:
        return []
    optimizer = section.get("OPTIMIZER", "adamw")
    if optimizer not in EXTREMEBERT_OPTIMIZERS:
        names = list(EXTREMEBERT_OPTIMIZERS)
        raise UserError(
            f"{path}: PRETRAIN.OPTIMIZER {optimizer} is unknown: {_nearest(optimizer, names)} Any other optimizer is "
            "PRETRAIN.optimizer_type"
        )
    recipe = EXTREMEBERT_PRETRAIN | EXTREMEBERT_OPTIMIZERS[optimizer]
    recipe |= {"learning_rate": section.get("LEARNING_RATE", EXTREMEBERT_RATE)}
    recipe |= {"max_train_steps": section.get("NUM_STEPS", EXTREMEBERT_STEPS)}
    flags.update(recipe | flags)
    return ["PRETRAIN is in ExtremeBERT's names: its recipe is in force (24 layers of 1024, global batch 4096)"]


def _extremebert_finetune(section, flags):
    if flags:
        return []
    flags.update(EXTREMEBERT_FINETUNE)
    return ["FINETUNE is in ExtremeBERT's names: its search is in force (156 runs, small tasks from MNLI)"]
