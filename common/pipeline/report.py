"""One page about a pipeline's run: what was trained on what, how it went, and how to do it again.

    python -m common.pipeline.report runs/quick [--compare_with runs/other]

The page is one file that asks for nothing from elsewhere.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import psutil
import torch

from common.errors import UserError, run_main
from common.files import write_whole
from common.pipeline.figures import loss_picture, rate_picture, scores_picture, speed_picture
from common.progress import format_count, format_duration
from common.report import read_metrics
from common.run_folder import ARGUMENTS, METRICS, RESULTS, git_commit

PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "numpy")
ANSWERS, AFTER_THEM = "Answers on held-out text:\n\n", "\n## "  # in a model card
# Settings that say where and how a run was watched, not what it computed
NOT_COMPARED = {"output_dir", "resume_from_checkpoint", "job_name", "cache_dir", "overwrite_output_dir"}


@dataclass
class Run:
    """What a folder holds: a pipeline's, or that of one run of run_pretraining.py.

    plan: plan.json; yaml: text; stamps: {stage: dict}. Of its pretraining: results and arguments ({} where there is
    none that has finished), metrics (rows), model (its configuration), answers (text). scores: results.json, or None.
    """

    name: str
    plan: dict = field(default_factory=dict)
    yaml: str = ""
    stamps: dict = field(default_factory=dict)
    results: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)
    metrics: list = field(default_factory=list)
    model: dict = field(default_factory=dict)
    answers: str = ""
    scores: dict | None = None

    @property
    def pretrained(self):
        """Whether it has a finished pretraining."""
        return bool(self.results)


def read_run(folder):
    """Read what a folder holds.

    Args:
        folder: Path of a pipeline, or of a run of run_pretraining.py.
    Returns:
        Run.
    Raises:
        UserError: it is neither.
    """
    run = Run(folder.resolve().name, plan=_json(folder / "plan.json"))
    if not run.plan and not (folder / RESULTS).exists():
        raise UserError(f"{folder}: neither a pipeline's folder (plan.json) nor a finished run ({RESULTS}); give one")
    pretrained = Path(run.plan["pretrained"]) if run.plan else folder
    if run.plan and not pretrained.exists():  # the pipeline was started in another folder
        pretrained = folder / pretrained.name
    if (pretrained / RESULTS).exists():
        run.results, run.arguments = _json(pretrained / RESULTS), _json(pretrained / ARGUMENTS)
        run.metrics, run.model = read_metrics(pretrained / METRICS), _json(pretrained / "config.json")
        card = pretrained / "README.md"
        text = card.read_text(encoding="utf-8") if card.exists() else ""
        run.answers = textwrap.dedent(text.partition(ANSWERS)[2].partition(AFTER_THEM)[0]).strip("\n")
    run.scores = _json(folder / "results.json") or None
    run.stamps = {path.stem: _json(path) for path in sorted((folder / "stamps").glob("*.json"))}
    if (folder / "pipeline.yaml").exists():
        run.yaml = (folder / "pipeline.yaml").read_text(encoding="utf-8")
    return run


def _json(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def render(run, other=None):
    """The page, as HTML.

    Args:
        run: Run; other: Run to compare with, or None.
    """
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=folder, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "points": points}
    pictures = [draw(run, other) for draw in (loss_picture, speed_picture, rate_picture)] if run.pretrained else []
    return environment.get_template("report.html").render(
        run=run,
        other=other,
        title=f"{run.name}: pipeline report",
        summary=summary(run),
        headlines=headlines(run),
        training=training_facts(run),
        pictures=pictures,
        scores=score_rows(run, other),
        scores_picture=scores_picture(run, other) if run.scores else None,
        comparison=comparison(run, other) if other else [],
        differences=differences(run, other) if other else [],
        stages=stage_rows(run),
        machine=environment_facts(),
        commit=run.arguments.get("commit") or git_commit() or "unknown",
        today=time.strftime("%Y-%m-%d"),
        command=f"bash scripts/run_pipeline.sh {shlex.quote(run.plan['config'])}" if run.plan else "",
        commands=run.plan.get("commands", {}),
    )


def percent(value):
    """A fraction as a person reads it."""
    return "–" if value is None else f"{100 * value:.1f} %"


def points(value, signed=False):
    """A score times 100, as GLUE reports it."""
    return "–" if value is None else f"{100 * value:{'+' if signed else ''}.2f}"


def summary(run):
    """What was trained on what, in sentences."""
    sentences = []
    if run.pretrained:
        model, results = run.model, run.results
        sentences.append(
            f"A {model['model_type']} model of {model['num_hidden_layers']} layers, {model['hidden_size']} wide, was "
            f"trained on {text_of(run)} for {duration(results['train_runtime'])}: {results['train_steps']:,} steps, "
            f"{format_count(results['train_tokens'])} tokens."
        )
        sentences.append(
            f"On held-out text its masked-token loss is {results['eval_loss']:.3f} nats and it gets "
            f"{percent(results['eval_accuracy'])} of the masked tokens right; by frequency alone it would be "
            f"{results['unigram_loss']:.3f} and {percent(results['unigram_accuracy'])}."
        )
    tasks = run.scores["tasks"] if run.scores else []
    if len(tasks) == 1 and tasks[0]["median"] is not None:
        row, baseline = tasks[0], tasks[0]["baseline"]
        text = f"Fine-tuned on {row['task']}, it scores {points(row['median'])} (median of {len(row['scores'])} seeds)"
        compared = "" if baseline["score"] is None else f"; {baseline['name']}: {points(baseline['score'])}"
        sentences.append(f"{text}{compared}.")
    elif tasks:
        sentences.append(average_sentence(run.scores))
    return sentences or ["Nothing has been trained yet."]


def average_sentence(scores):
    """The GLUE average, or what is missing from it."""
    if scores["average"] is None:
        return "None of GLUE's tasks has a score."
    if not scores["missing"]:
        return f"The GLUE average is {points(scores['average'])} (eight tasks; WNLI is left out)."
    found = 8 - len(scores["missing"])
    return (
        f"The mean over {found} of GLUE's eight tasks is {points(scores['average'])}; it is not the GLUE average, as "
        f"{', '.join(scores['missing'])} are missing."
    )


def text_of(run):
    """The training text, in a phrase."""
    if run.plan:
        return run.plan["text"]
    data = run.arguments["data"]
    if data["dataset_path"] or data["train_file"]:
        return data["dataset_path"] or data["train_file"]
    name = " ".join(filter(None, (data["dataset_name"], data["dataset_config_name"])))
    return name or "the documentation in the installed Python packages"


def duration(seconds):
    """Seconds in words."""
    if seconds < 5400:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"


def headlines(run):
    """[(number, what it is)], the four that say most."""
    found = []
    if run.pretrained:
        results = run.results
        found.append((f"{results['eval_loss']:.3f}", f"held-out loss (unigram {results['unigram_loss']:.3f})"))
        accuracy = f"held-out accuracy (unigram {percent(results['unigram_accuracy'])})"
        found.append((percent(results["eval_accuracy"]), accuracy))
        if results.get("tokens_per_second"):
            found.append((format_count(results["tokens_per_second"]), "real tokens per second"))
    if run.scores:
        tasks = run.scores["tasks"]
        if len(tasks) == 1 and tasks[0]["median"] is not None:
            found.append(
                (points(tasks[0]["median"]), f"{tasks[0]['task']}, median of {len(tasks[0]['scores'])} seeds")
            )
        elif run.scores["average"] is not None:
            missing = len(run.scores["missing"])
            found.append(
                (points(run.scores["average"]), f"mean of {8 - missing} GLUE tasks" if missing else "GLUE average")
            )
    return found


def training_facts(run):
    """[(what, value)] of the pretraining."""
    if not run.pretrained:
        return []
    model, results, arguments = run.model, run.results, run.arguments
    training, data = arguments["training"], arguments["data"]
    length = data.get("max_seq_length_stages") or data["max_seq_length"]
    facts = [
        ("Model", f"{model['model_type']}, {model['num_hidden_layers']} layers, hidden size {model['hidden_size']}"),
        ("Vocabulary", f"{model['vocab_size']:,} tokens"),
        ("Text", text_of(run)),
        ("Rows", f"{length} tokens, {100 * data['mlm_probability']:.0f} % predicted"),
        ("Seen", f"{results['train_tokens']:,} tokens in {results['train_steps']:,} steps"),
        ("Global batch", f"{training['train_batch_size']:,} rows"),
        ("Optimizer", f"{training['optimizer_type']}, peak learning rate {training['learning_rate']:g}"),
        ("Schedule", f"{training['lr_scheduler_type']} by {training['lr_schedule']}"),
        ("Time used", f"{duration(results['train_runtime'])}; ended by: {results['stop_reason']}"),
        ("Strategy", f"{results['strategy']}, {results['world_size']} process(es), {results['precision']}"),
        ("Device", results["device"]),
    ]
    if results.get("mfu") is not None:
        facts.append(("Utilisation", f"{percent(results['mfu'])} of the best matrix product measured there"))
    if results.get("peak_memory_bytes"):
        facts.append(("Peak memory", f"{results['peak_memory_bytes'] / 2**30:.2f} GiB"))
    return facts


def score_rows(run, other):
    """Rows of the table of tasks, each with the other run's median and the difference, None where there is none."""
    if not run.scores:
        return []
    medians = {row["task"]: row["median"] for row in other.scores["tasks"]} if other and other.scores else {}
    rows = []
    for row in run.scores["tasks"]:
        theirs = medians.get(row["task"])
        both = row["median"] is not None and theirs is not None
        rows.append(row | {"other": theirs, "difference": row["median"] - theirs if both else None})
    return rows


def comparison(run, other):
    """[(what, this run's, the other's)], as text, of the pretraining."""
    if not (run.pretrained and other.pretrained):
        return []
    named = {
        "held-out loss (nats)": ("eval_loss", "{:.3f}"),
        "held-out accuracy": ("eval_accuracy", "{:.1%}"),
        "tokens": ("train_tokens", "{:,}"),
        "steps": ("train_steps", "{:,}"),
        "seconds": ("train_runtime", "{:,.0f}"),
        "real tokens per second": ("tokens_per_second", "{:,.0f}"),
    }
    rows = []
    for what, (name, style) in named.items():
        values = [one.results.get(name) for one in (run, other)]
        rows.append((what, *("–" if value is None else style.format(value) for value in values)))
    return rows


def differences(run, other):
    """[(flag, this run's value, the other's)] of the pretrainings' settings that differ."""
    if not (run.pretrained and other.pretrained):
        return []
    mine, theirs = (
        {name: value for group in ("model", "data", "training") for name, value in one.arguments[group].items()}
        for one in (run, other)
    )
    names = [name for name in {**mine, **theirs} if name not in NOT_COMPARED]
    return [(name, mine.get(name), theirs.get(name)) for name in names if mine.get(name) != theirs.get(name)]


def stage_rows(run):
    """[(stage, how long it took, when it was finished)]."""
    order = list(run.plan.get("commands", {}))
    found = sorted(run.stamps.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))
    return [
        (name, format_duration(stamp["seconds"]), stamp["finished"] or "not finished")
        for name, stamp in found
        if name != "report"  # which is being made
    ]


def environment_facts():
    """[(what, value)] of this machine and what is installed."""
    facts = [
        ("Processor", f"{processor()}, {os.cpu_count()} cores"),
        ("Memory", f"{psutil.virtual_memory().total / 2**30:.0f} GiB"),
        ("GPUs", ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "none"),
        ("System", f"{platform.system()} {platform.release()}"),
        ("Python", platform.python_version()),
    ]
    return facts + [(name, importlib.metadata.version(name)) for name in PACKAGES]


def processor():
    """The processor's name, as far as the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def main():
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="A pipeline's.")
    parser.add_argument("--compare_with", type=Path, help="Another pipeline's, or a run of run_pretraining.py.")
    args = parser.parse_args()
    run, page = read_run(args.folder), args.folder / "report.html"
    other = read_run(args.compare_with) if args.compare_with else None
    if other and other.name == run.name:
        other.name = str(args.compare_with)
    write_whole(page, render(run, other))
    print(f"report: {page}")


if __name__ == "__main__":
    run_main(main)
