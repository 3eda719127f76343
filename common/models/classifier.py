"""Sequence classifiers: stock transformers classes whose loss weighs every example of the global batch the same.

BERT's, Megatron-BERT's and DeBERTa's compute less than stock, with the same result: see common/models/layers.py.

B rows, S positions, C classes (1 for a score), H hidden size.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    DebertaForSequenceClassification,
    DebertaV2ForSequenceClassification,
    MegatronBertForSequenceClassification,
)
from transformers.utils import ModelOutput

from common.errors import UserError, first_line
from common.loading import WEIGHTS_ERRORS
from common.models.attention import compute_dtype
from common.models.disentangled import Relative, encode, relative_positions
from common.models.families import has_unknown_parts
from common.models.layers import make_fast, use_attention
from common.models.whole import build_whole, load_whole


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
        return self._judge(self.class_logits(**inputs), weights, labels, loss_denominator)

    def _judge(self, logits, weights, labels=None, loss_denominator=None, **_):
        """ClassifierOutput of logits [B, C]; the others as forward."""
        logits = logits.float()
        if labels is None:
            return ClassifierOutput(logits=logits)
        if logits.shape[1] == 1:
            losses = F.mse_loss(logits[:, 0], labels, reduction="none")
        else:
            losses = F.cross_entropy(logits, labels, reduction="none")
        total = weights.sum() if loss_denominator is None else loss_denominator
        return ClassifierOutput(loss=(losses * weights).sum() / total, logits=logits, losses=losses)

    def class_logits(self, **inputs):
        """[B, C]: as the stock model computes them."""
        return super().forward(**inputs).logits


class FirstPositionMixin(WeightedExamplesMixin):
    """Of the last layer, whose output the head reads at the first position, computes that position alone."""

    def class_logits(self, **inputs):
        """[B, C]: the stock model's numbers; input_ids, attention_mask, token_type_ids [B, S] int64."""
        return self._head(self._pass(inputs, None, range(len(self.called_layers()))))

    def called_layers(self):
        """The layers in the order in which they are called."""
        return self.base_model.encoder.layer

    def run_part(self, batch, hidden, layers):
        """What a part of the layers makes of a micro-batch: the first one embeds it, the last one judges it.

        Args:
            batch: what forward takes; hidden: [B, S, H] of the layer before, None where there is none.
            layers: range of the numbers of layers that are called.
        Returns:
            [B, S, H], or ClassifierOutput where the last layer is among them.
        """
        hidden = self._pass(batch, hidden, layers)
        return hidden if layers.stop < len(self.called_layers()) else self._judge(self._head(hidden), **batch)

    def _pass(self, inputs, hidden, layers):
        """[B, S, H], or [B, 1, H] of the last layer; arguments as run_part."""
        if layers.start == 0:
            types = inputs.get("token_type_ids")
            hidden = self.base_model.embeddings(input_ids=inputs["input_ids"], token_type_ids=types)
        first = torch.zeros_like(inputs["input_ids"][:, :1])
        return self._run_layers(hidden, inputs["attention_mask"], first, layers)

    def _run_layers(self, hidden, attention_mask, first, numbers):
        encoder, mask = self.base_model.encoder, _added_to_scores(attention_mask)
        final = len(encoder.layer) - 1
        for number in numbers:
            layer = encoder.layer[number]
            hidden = layer(hidden, mask, first) if number == final else layer(hidden, mask)
        last_norm = hasattr(encoder, "ln") and numbers.stop > final  # of the pre-norm family
        return encoder.ln(hidden) if last_norm else hidden

    def _head(self, hidden):
        return self.classifier(self.dropout(self.base_model.pooler(hidden)))


class DisentangledFirstPositionMixin(FirstPositionMixin):
    """The same for both DeBERTas."""

    def _run_layers(self, hidden, attention_mask, first, numbers):
        encoder, mask = self.base_model.encoder, _added_to_scores(attention_mask)
        context = Relative(mask, *relative_positions(encoder, attention_mask.shape[1], attention_mask.device))
        return encode(encoder, hidden, (context, context), attention_mask, first, numbers)

    def _head(self, hidden):
        return self.classifier(self.dropout(self.pooler(hidden)))


FAST = {
    BertForSequenceClassification: FirstPositionMixin,
    MegatronBertForSequenceClassification: FirstPositionMixin,
    DebertaForSequenceClassification: DisentangledFirstPositionMixin,
    DebertaV2ForSequenceClassification: DisentangledFirstPositionMixin,
}


def _added_to_scores(attention_mask):
    """[B, 1, 1, S]: 0, or the lowest finite number for padding, in the precision of the scores."""
    dtype = compute_dtype(attention_mask.device)
    mask = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    return mask.masked_fill_(attention_mask == 0, torch.finfo(dtype).min)[:, None, None]


def build_classifier(args, task, trained_head=False, load=load_whole, build=build_whole):
    """Load a checkpoint's encoder and put a head for a task on it; with random weights where that is asked for.

    Args:
        args: model_name_or_path, random_weights, cache_dir, trust_remote_code, ignore_mismatched_sizes.
        task: common.data.glue.Task.
        trained_head: refuse a checkpoint that does not bring the task's head.
        load, build: what common.parallel.loader and builder returned.
    Returns:
        a stock transformers model whose forward is WeightedExamplesMixin's; its numbers may come with prepare().
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
            model, missing = build(partial(AutoModelForSequenceClassification.from_config, config, **common)), []
        else:
            model, info = load(
                AutoModelForSequenceClassification,
                args.model_name_or_path,
                config=config,
                cache_dir=args.cache_dir,
                dtype=torch.float32,
                ignore_mismatched_sizes=args.ignore_mismatched_sizes,
                **common,
            )
            missing = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    except WEIGHTS_ERRORS as error:
        fault = first_line(error)
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
    mixin = WeightedExamplesMixin
    if stock in FAST and not (getattr(config, "is_decoder", False) or has_unknown_parts(config)):
        mixin = FAST[stock]
        make_fast(model)
        use_attention(model, "sdpa")
    model.__class__ = type(stock.__name__, (mixin, stock), {"__module__": __name__})
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
