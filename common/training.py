"""What the entry scripts' loops share: the state of a run, its log between two host syncs, evaluation, saving."""

import math
import time
from dataclasses import dataclass

import torch

from common.errors import DivergedError
from common.parallel.state import consolidated_weights, plain_model

LESS_EXTREME = (
    "lower --learning_rate, lengthen --warmup_proportion or clip with --max_grad_norm; the last checkpoint is good, "
    "--resume_from_checkpoint latest goes back to it"
)


@dataclass
class TrainState:
    """Where a run stands. Equal on all processes; saved with every checkpoint."""

    completed_steps: int = 0
    consumed_rows: int = 0
    consumed_tokens: int = 0

    def finish_step(self, rows, tokens):
        """Count an optimizer step over `rows` rows with `tokens` real tokens."""
        self.completed_steps += 1
        self.consumed_rows += rows
        self.consumed_tokens += tokens


class StepLog:
    """Losses and gradient norms since the last log, kept on the device: reading them is the loop's only host sync."""

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self._restart()

    def add(self, loss):
        """Take a micro-batch's loss (scalar tensor)."""
        self._micro_losses.append(loss.detach())

    def finish_step(self, grad_norm, tokens):
        """Close an optimizer step: its loss is the mean of its micro-batches'.

        Args:
            grad_norm: scalar tensor, or None where nothing was clipped.
            tokens: real tokens of the step over all processes.
        """
        self._losses.append(torch.stack(self._micro_losses).mean())
        self._micro_losses = []
        if grad_norm is not None:
            self._grad_norms.append(torch.as_tensor(grad_norm).detach().to(self._losses[-1].device, torch.float32))
        self._tokens += tokens

    def paused(self):
        """Context in which time does not count as training (validation, saving)."""
        return _Pause(self)

    def pop(self, last_step):
        """Averages since the last call, over steps and processes.

        Args:
            last_step: number of the newest step.
        Returns:
            (metrics, interval): loss and, where known, grad_norm; steps, tokens and seconds of training.
        Raises:
            DivergedError: a loss or gradient norm that is NaN or infinite, with its step.
        """
        losses = self.accelerator.reduce(torch.stack(self._losses), reduction="mean").tolist()  # host sync
        norms = torch.stack(self._grad_norms).tolist() if self._grad_norms else []
        first = last_step - len(losses) + 1
        for what, values in (("loss", losses), ("gradient norm", norms)):
            for step, value in enumerate(values, first):
                if not math.isfinite(value):
                    raise DivergedError(f"the {what} became {value} at step {step}: {LESS_EXTREME}")
        seconds = time.perf_counter() - self._began - self.paused_seconds
        metrics = {"loss": sum(losses) / len(losses)} | ({"grad_norm": norms[-1]} if norms else {})
        interval = {"steps": len(losses), "tokens": self._tokens, "seconds": seconds}
        self._restart()
        return metrics, interval

    def _restart(self):
        self._micro_losses, self._losses, self._grad_norms = [], [], []
        self._tokens, self._began, self.paused_seconds = 0, time.perf_counter(), 0.0


class _Pause:
    def __init__(self, log):
        self.log = log

    def __enter__(self):
        self.began = time.perf_counter()

    def __exit__(self, *_):
        self.log.paused_seconds += time.perf_counter() - self.began


def evaluate(accelerator, model, eval_batches):
    """Loss and accuracy on the fixed masked positions of the held-out rows. Every process calls it.

    Args:
        model: prepared model whose output has `losses` and `correct`, [B, k].
        eval_batches: this process's batches, the same number for each.
    Returns:
        dict: eval_loss (mean over positions, in nats), eval_accuracy.
    Raises:
        DivergedError: a loss that is not a number.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for batch in eval_batches:
            output, weights = model(**batch), batch["masked_weights"]
            parts = [(output.losses * weights).sum(), (output.correct * weights).sum(), weights.sum()]
            sums += torch.stack(parts).to("cpu", torch.float64)
    model.train()
    loss, correct, weight = accelerator.reduce(sums.to(accelerator.device), reduction="sum").tolist()
    if not math.isfinite(loss):
        raise DivergedError(f"the validation loss is not a number: {LESS_EXTREME}")
    return {"eval_loss": loss / weight, "eval_accuracy": correct / weight}


def refuse_infinite_weights(model, step):
    """Raise DivergedError where the last update made a weight NaN or infinite: the loss shows it only a step later."""
    finite = torch.stack([torch.isfinite(parameter).all() for parameter in model.parameters()]).all()
    if not finite:  # host sync
        raise DivergedError(f"the weights are no longer finite after step {step}: {LESS_EXTREME}")


def save_pretrained(accelerator, model, tokenizer, folder):
    """Write a stock transformers model and its tokenizer. Every process calls it.

    Args:
        model: prepared model; folder: Path.
    """
    weights = consolidated_weights(accelerator, model)
    if accelerator.is_main_process:
        plain_model(model).save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
    accelerator.wait_for_everyone()
