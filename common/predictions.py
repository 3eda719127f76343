"""What a classifier says of a split: on any number of processes, scored and written down.

n examples, C classes (1 for a score).
"""

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object

from common.data.examples import prediction_batches


def predict(accelerator, model, examples, batch_size, rank, ranks):
    """The model's outputs for every example, in the order of the split. Every process calls it and gets all.

    Args:
        model: prepared; examples: EncodedExamples; batch_size: rows a device takes at once.
        rank, ranks: this process among those that read different rows.
    Returns:
        [n, C] float32.
    """
    model.eval()
    found = []
    with torch.no_grad():
        for rows, batch in prediction_batches(examples, batch_size, rank, ranks, accelerator.device):
            batch.pop("labels", None)
            found.append((rows, model(**batch).logits[: len(rows)].cpu().numpy()))
    model.train()
    found = gather_object(found)
    outputs = np.empty((len(examples), found[0][1].shape[1]), np.float32)
    for rows, logits in found:
        outputs[rows] = logits
    return outputs


def decide(task, outputs):
    """[n] class numbers, or scores, of outputs [n, C]."""
    return outputs.argmax(axis=1) if task.labels else outputs[:, 0]


def example_losses(task, outputs, labels):
    """[n] float32: each example's cross-entropy, or squared error."""
    outputs, labels = torch.from_numpy(outputs), torch.from_numpy(labels)
    if task.labels is None:
        return F.mse_loss(outputs[:, 0], labels, reduction="none").numpy()
    return F.cross_entropy(outputs, labels, reduction="none").numpy()


def score(task, outputs, labels, suffix):
    """The official metrics, and the mean loss.

    Args:
        task: common.data.glue.Task; outputs: [n, C]; labels: [n]; suffix: behind each name ("_mm").
    Returns:
        dict: eval_<metric>, eval_loss, eval_samples.
    """
    from common.metrics import GlueMetric  # imports datasets, scipy and scikit-learn, which takes seconds

    metrics = GlueMetric(task.metrics, task.labels is None).compute(
        predictions=decide(task, outputs).tolist(), references=labels.tolist()
    )
    values = {**metrics, "loss": float(example_losses(task, outputs, labels).mean()), "samples": len(labels)}
    return {f"eval_{name}{suffix}": value for name, value in values.items()}


def write_predictions(path, task, examples, outputs, labels=None):
    """Write a tab-separated table: index, prediction (a label, or a score); with labels, also the
    label and the example's loss."""
    names = (lambda value: task.labels[int(value)]) if task.labels else (lambda value: f"{value:.9g}")
    columns = {"index": [example.index for example in examples], "prediction": map(names, decide(task, outputs))}
    if labels is not None:
        columns["label"] = map(names, labels)
        columns["loss"] = (f"{loss:.6f}" for loss in example_losses(task, outputs, labels))
    rows = zip(*columns.values(), strict=True)
    path.write_text("".join("\t".join(row) + "\n" for row in (list(columns), *rows)), encoding="utf-8")
