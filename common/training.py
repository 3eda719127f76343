"""What the entry scripts' loops share: the state of a run, its log between two host syncs, evaluation, saving."""

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import DivergedError
from common.models.presets import GENERATOR
from common.parallel.state import all_finite, consolidated_weights, plain_model

LESS_EXTREME = (
    "continue with --resume_from_checkpoint latest (or an older step_N) and a lower --learning_rate, a longer "
    "--warmup_proportion or clipping by --max_grad_norm"
)
MOST_UNREAD = 100  # steps whose losses may wait on the device
MOST_SKIPPED = 40  # updates in a row; the loss scale begins at 2**16 and is halved each time


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
    """Losses and gradient norms since the last log. They stay on the device until they are read, which waits for it.

    Args:
        accelerator: for the mean over processes.
        totals: what `state` of a checkpoint held: an interval that was begun before it.
    """

    def __init__(self, accelerator, totals=None):
        self.accelerator, self._skipped = accelerator, 0
        self._restart(**(totals or {}))

    def add(self, loss):
        """Take a micro-batch's loss (scalar tensor)."""
        self._micro_losses.append(loss.detach())

    def finish_step(self, step, grad_norm, tokens, rows):
        """Close an optimizer step: its loss is the mean of its micro-batches'.

        Args:
            step: its number.
            grad_norm: scalar tensor, or None where nothing was clipped.
            tokens, rows: real tokens and rows of the step over all processes.
        """
        loss = torch.stack(self._micro_losses).mean()
        norm = None if grad_norm is None else torch.as_tensor(grad_norm).detach().to(loss)
        self._unread.append((step, loss, norm))
        self._micro_losses, self._skipped = [], 0
        self.totals["tokens"] += tokens
        self.totals["rows"] += rows
        if len(self._unread) >= MOST_UNREAD:
            self.read()

    def drop_step(self, step):
        """Forget the losses of an update that fp16 skipped because its gradients overflowed.

        Args:
            step: the last one that was made.
        Raises:
            DivergedError: many in a row.
        """
        self._micro_losses, self._skipped = [], self._skipped + 1
        if self._skipped == MOST_SKIPPED:
            raise DivergedError(f"{MOST_SKIPPED} updates in a row overflowed in fp16 at step {step}: {LESS_EXTREME}")

    def paused(self):
        """Context in which time does not count as training (validation, saving)."""
        return _Pause(self)

    def read(self):
        """Add what is on the device to the totals.

        Raises:
            DivergedError: a loss or gradient norm that is NaN or infinite, with its step.
        """
        if not self._unread:
            return
        steps, losses, norms = zip(*self._unread, strict=True)
        losses = self.accelerator.reduce(torch.stack(losses), reduction="mean").tolist()  # host sync
        norms = [None if norm is None else norm.item() for norm in norms]  # the same on all processes
        for step, loss, norm in zip(steps, losses, norms, strict=True):
            for what, value in (("loss", loss), ("gradient norm", norm)):
                if value is not None and not math.isfinite(value):
                    raise DivergedError(f"the {what} became {value} at step {step}: {LESS_EXTREME}")
            self.totals["loss"] += loss
            self.totals["steps"] += 1
            self.totals["grad_norm"] = norm
        self._unread = []

    def state(self):
        """The interval so far, for a checkpoint: a continued run logs the same averages."""
        self.read()
        return self.totals | {"seconds": self._seconds()}

    def pop(self):
        """Averages since the last call, over steps and processes.

        Returns:
            (metrics, interval): loss and grad_norm (of the last step, None where unknown); steps, tokens, rows and
            seconds of training.
        Raises:
            DivergedError: as read().
        """
        interval = self.state()
        metrics = {"loss": interval.pop("loss") / interval["steps"], "grad_norm": interval.pop("grad_norm")}
        self._restart()
        return metrics, interval

    def _seconds(self):
        return time.perf_counter() - self._began - self.paused_seconds + self.totals["seconds"]

    def _restart(self, **totals):
        self._micro_losses, self._unread = [], []
        self.totals = {"loss": 0.0, "grad_norm": None, "steps": 0, "tokens": 0, "rows": 0, "seconds": 0.0}
        self.totals |= totals
        self._began, self.paused_seconds = time.perf_counter(), 0.0


class _Pause:
    def __init__(self, log):
        self.log = log

    def __enter__(self):
        self.began = time.perf_counter()

    def __exit__(self, *_):
        self.log.paused_seconds += time.perf_counter() - self.began


@contextlib.contextmanager
def judged_weights(accelerator, model, optimizer):
    """Context in which a model has the weights that are to be judged and saved. Every process enters it.

    They are the ones in training, unless the optimizer averages these and switches by eval() and train(). What is
    trained comes back bit for bit, which train() alone would round.

    Args:
        model, optimizer: as accelerator.prepare returned them, between two steps.
    """
    averaging = optimizer.optimizer
    if not hasattr(averaging, "eval"):
        yield
        return
    plain, states = plain_model(model), accelerator.states
    states.rest(plain)
    trained = [(parameter, parameter.detach().clone()) for parameter in plain.parameters()]
    averaging.eval()
    try:
        yield
    finally:
        states.rest(plain)
        averaging.train()
        with torch.no_grad():
            for parameter, before in trained:
                parameter.copy_(before)


def evaluate(accelerator, model, eval_batches):
    """Loss and accuracy on the held-out rows. Every process calls it.

    Args:
        model: prepared model whose output has `losses` and `correct` for each predicted position.
        eval_batches: this process's batches, the same number for each.
    Returns:
        dict: eval_loss (mean over predicted positions, in nats), eval_accuracy; where there are pairs of sentences
        eval_sentence_loss and eval_sentence_accuracy, too, and of a discriminator, over all tokens,
        eval_discriminator_loss and eval_discriminator_accuracy.
    Raises:
        DivergedError: a loss that is not a number.
    """
    model.eval()
    sums = 0.0
    with torch.no_grad():
        for batch in eval_batches:
            output = model(**batch)
            judged = {"eval_": (output.losses, output.correct, batch[eval_batches.objective.weights])}
            if "sentence_weights" in batch:
                of_pairs = output.sentence_losses, output.sentence_correct, batch["sentence_weights"]
                judged["eval_sentence_"] = of_pairs
            if "token_weights" in batch:
                judged["eval_discriminator_"] = output.token_losses, output.token_correct, batch["token_weights"]
            parts = [((losses * w).sum(), (correct * w).sum(), w.sum()) for losses, correct, w in judged.values()]
            sums += torch.stack([torch.stack(part) for part in parts]).to("cpu", torch.float64)
    model.train()
    evaluation = {}
    sums = accelerator.reduce(sums.to(accelerator.device), reduction="sum").tolist()
    for name, (loss, correct, weight) in zip(judged, sums, strict=True):
        if not math.isfinite(loss):
            raise DivergedError(f"the validation loss is not a number: {LESS_EXTREME}")
        evaluation |= {f"{name}loss": loss / weight, f"{name}accuracy": correct / weight}
    return evaluation


def refuse_infinite_weights(accelerator, model, step):
    """Raise DivergedError where the last update made a weight NaN or infinite: the loss shows it only a step later."""
    if not all_finite(accelerator, model):  # host sync
        raise DivergedError(f"the weights are no longer finite after step {step}: {LESS_EXTREME}")


def save_pretrained(accelerator, model, tokenizer, folder):
    """Write a stock transformers model, or a pair of them, and its tokenizer. Every process calls it.

    Args:
        model: prepared model; tokenizer: None where there is none; folder: Path.
    """
    weights = consolidated_weights(accelerator, model)
    if accelerator.is_main_process:
        plain = plain_model(model)
        dtype = next(iter(weights.values())).dtype  # not that of the parameters, which may be copies in bf16
        plain.save_pretrained(folder, state_dict=weights)  # which empties the dict
        plain.config.dtype = dtype
        plain.config.save_pretrained(folder)
        if tokenizer is not None:
            for place in filter(Path.is_dir, (folder, folder / GENERATOR)):
                tokenizer.save_pretrained(place)
    accelerator.wait_for_everyone()
