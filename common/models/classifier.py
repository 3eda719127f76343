"""Sequence classifiers: stock transformers classes whose loss weighs every example of the global batch the same.

B rows, S positions, C classes (1 for a score).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.utils import ModelOutput

from common.errors import UserError


@dataclass
class ClassifierOutput(ModelOutput):
    """loss: scalar, None without labels; logits: [B, C] float32; losses: [B] float32, None without labels."""

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    losses: torch.FloatTensor | None = None


class WeightedExamplesMixin:
    """Gives a stock classifier a loss that does not depend on how the global batch is cut."""

    def forward(self, weights, labels=None, loss_denominator=None, **inputs):
        """Logits and loss of a micro-batch.

        Args:
            weights: [B] float32; labels: [B] int64 (classes) or float32 (scores), or None.
            loss_denominator: scalar float32: rows of the global batch over its number of micro-batches; None = rows.
            inputs: input_ids, attention_mask, token_type_ids [B, S] int64.
        Returns:
            ClassifierOutput.
        """
        logits = super().forward(**inputs).logits.float()
        if labels is None:
            return ClassifierOutput(logits=logits)
        if logits.shape[1] == 1:
            losses = F.mse_loss(logits[:, 0], labels, reduction="none")
        else:
            losses = F.cross_entropy(logits, labels, reduction="none")
        total = weights.sum() if loss_denominator is None else loss_denominator
        return ClassifierOutput(loss=(losses * weights).sum() / total, logits=logits, losses=losses)


def build_classifier(args, task, attention="sdpa", trained_head=False):
    """Load a checkpoint's encoder and put a head for a task on it; with random weights where that is asked for.

    Args:
        args: model_name_or_path, random_weights, cache_dir, trust_remote_code, ignore_mismatched_sizes.
        task: common.data.glue.Task.
        trained_head: refuse a checkpoint that does not bring the task's head.
    Returns:
        a stock transformers model whose forward is WeightedExamplesMixin's.
    Raises:
        UserError: what cannot be loaded, or lacks a part of its encoder.
    """
    where = f"--model_name_or_path {args.model_name_or_path}"
    labels = task.labels or ("score",)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: number for number, label in enumerate(labels)}}
    common = {"trust_remote_code": args.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(args.model_name_or_path, cache_dir=args.cache_dir, **common, **names)
        config.problem_type = "single_label_classification" if task.labels else "regression"
        if args.random_weights:
            model, missing = AutoModelForSequenceClassification.from_config(config, **common), []
        else:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                args.model_name_or_path,
                config=config,
                cache_dir=args.cache_dir,
                dtype=torch.float32,
                ignore_mismatched_sizes=args.ignore_mismatched_sizes,
                output_loading_info=True,
                **common,
            )
            missing = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        fault = str(error).strip().partition("\n")[0]
        raise UserError(f"{where} cannot be loaded ({fault}): give a folder that save_pretrained wrote") from error
    prefix = f"{model.base_model_prefix}."
    lost = sorted(key for key in missing if key.startswith(prefix) and "pooler" not in key)
    if lost:
        raise UserError(f"{where} lacks {lost[0]} ({len(lost)} parts of the encoder): is it the whole checkpoint?")
    if trained_head and missing:
        raise UserError(f"{where} has no head for {task.name} ({sorted(missing)[0]}): fine-tune it with --do_train")
    if trained_head and task.labels:
        own = AutoConfig.from_pretrained(args.model_name_or_path, cache_dir=args.cache_dir, **common).id2label
        _refuse_other_classes(where, task, [own[number].lower() for number in sorted(own)])
    stock = type(model)
    model.__class__ = type(stock.__name__, (WeightedExamplesMixin, stock), {"__module__": __name__})
    return model


def _refuse_other_classes(where, task, classes):
    """Raise UserError where a head's classes are named, and are others than the task's or in another order."""
    generic = [f"label_{number}" for number in range(len(classes))]
    numbers = [str(number) for number in range(len(classes))]  # what the task calls them then says nothing
    if classes != generic and list(task.labels) != numbers and classes != list(task.labels):
        raise UserError(
            f"{where}: its head decides between {', '.join(classes)}, {task.name} between {', '.join(task.labels)}, "
            "in this order: fine-tune it with --do_train"
        )
