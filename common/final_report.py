"""What a finished language model leaves and shows: curves, model card, results, a summary on the screen."""

import time

from common import run_folder
from common.report import format_summary, read_metrics, write_all_results, write_curves, write_model_card

SHAPE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


def report(kind, output_dir, results, corpus, examples, config, command, meter):
    """Leave curves, model card and results in the folder of a finished run, and show the summary.

    Args:
        kind: common.report.ModelKind.
        output_dir: Path that holds the saved model.
        results: as for all_results.json; corpus: PreparedCorpus; examples: of what the model answers.
        config: the model's; command: the command line of the run; meter: the run's common.utilisation.Meter.
    """
    title = f"{config.model_type} trained on {corpus.source}"
    metrics = read_metrics(output_dir / run_folder.METRICS)
    write_curves(metrics, output_dir / "curves.png", title, results["unigram_loss"], kind)
    budget = {
        "hours used": f"{results['train_runtime'] / 3600:.3f}",
        "steps": f"{results['train_steps']:,}",
        "ended by": results["stop_reason"],
        "hardware": f"{results['world_size']} x {results['device']}, {results['precision']}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": run_folder.git_commit() or "unknown",
    }
    write_model_card(
        output_dir / "README.md",
        title=title,
        command=command,
        facts={
            "Data": {"text": corpus.source, "tokens seen": f"{results['train_tokens']:,}"},
            "Budget": budget,
            "Model": {name: str(getattr(config, name)) for name in SHAPE},
        },
        results=results,
        examples=examples,
        licence_note="The weights are yours. The text has its own licences: see its source before you publish them.",
        tags=(config.model_type,),
        kind=kind,
    )
    peak = f"{meter.peak / 1e9:,.0f} GFLOP/s (best matrix product here)"
    formula = f"FLOPs needed per second / {peak}; FLOPs = {meter.formula}"
    names = {"model": ".", "model card": "README.md", "curves": "curves.png", "metrics": run_folder.METRICS}
    files = {name: output_dir / file for name, file in names.items()} | {"prepared data": corpus.folder}
    summary = {"files": files, "model_folder": output_dir, "mfu_formula": formula, "kind": kind}
    print(format_summary(results, examples=examples, **summary))
    write_all_results(output_dir / run_folder.RESULTS, results)  # last: says that the run is finished
