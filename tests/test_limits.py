"""What ends a run and what is due on the way, against a slow count."""

import pytest
import torch

from common.batch_size import cut_global_batch
from common.errors import UserError
from common.limits import Limits, due
from common.training import TrainState
from common.training_arguments import TrainingArguments
from common.utilisation import masked_flops


class Clock:
    """Hours and limits, set by hand."""

    def __init__(self, used=0.0, budget=float("inf")):
        self.used_hours, self.limit_hours, self.progress = used, budget, min(1.0, used / budget)

    @property
    def expired(self):
        return self.used_hours >= self.limit_hours


def limits(rows=25_600, clock=None, **changes):
    return Limits(TrainingArguments(**{"train_batch_size": 32, **changes}), rows, clock or Clock(), TrainState())


def test_due_is_the_multiples_in_between():
    for every in (1, 3, 7):
        hits = [now for now in range(1, 50) if due(now - 1, now, every)]
        assert hits == [now for now in range(1, 50) if now % every == 0]
    assert due(0.9, 2.1, 1) and not due(2.1, 2.9, 1)
    assert not due(0, 9, None) and not due(0, 9, 0) and not due(0, 9, -1)


@pytest.mark.parametrize("batch", [10, 64, 100])  # up to the 100 rows of a shard
def test_validation_follows_extremeberts_schedule_in_shards(batch):
    """A shard is 1/256 of the rows; each first, tenth or second one is validated, by the share of the budget."""
    steps = 25_600 // batch
    run = limits(
        train_batch_size=batch,
        max_train_steps=steps,
        do_validation=True,
        validation_epochs=10,
        validation_epochs_end=2,
        validation_begin_proportion=0.25,
        validation_end_proportion=0.125,
    )
    seen = []
    for _ in range(steps):
        before = run.state.consumed_rows
        run.state.finish_step(batch, 0)
        if run.validation_due(before):
            seen.append(run.state.consumed_rows)
    expected = []
    for step in range(1, steps + 1):
        share, before, now = step / steps, (step - 1) * batch, step * batch
        every = 1 if share < 0.25 else 2 if share > 0.875 else 10
        if any(row % (100 * every) == 0 for row in range(before + 1, now + 1)):
            expected.append(now)
    assert seen == expected and len(seen) > 20


def test_eval_steps_come_before_the_schedule_in_shards():
    run = limits(train_batch_size=100, max_train_steps=100, do_validation=True, eval_steps=30)
    seen = []
    for _ in range(100):
        before = run.state.consumed_rows
        run.state.finish_step(100, 0)
        seen += [run.state.completed_steps] if run.validation_due(before) else []
    assert seen == [30, 60, 90]


def test_whichever_limit_comes_first():
    assert limits(max_train_steps=9, num_train_epochs=1, train_batch_size=100).max_steps == 9
    assert limits(max_train_steps=900, num_train_epochs=1, train_batch_size=100).max_steps == 256
    assert limits(num_train_epochs=0.5, train_batch_size=100).max_steps == 128
    run = limits(clock=Clock(0.5, 2.0), max_train_steps=10)
    run.state.completed_steps = 4
    assert run.share == 0.4 and run.reached is None and run.remaining_seconds == pytest.approx(0.75 * 3600)
    run.state.completed_steps = 10
    assert run.reached == "all steps done"
    assert limits(clock=Clock(2.0, 2.0)).reached == "time budget spent"


def test_the_schedule_follows_time_or_steps():
    run = limits(clock=Clock(0.5, 2.0), max_train_steps=10, lr_schedule="time")
    run.state.completed_steps = 9
    assert run.schedule_progress == 0.25
    run.args.lr_schedule = "step"
    assert run.schedule_progress == 0.9
    assert limits(max_train_steps=20, num_warmup_steps=5).warmup_proportion == 0.25


def test_checkpoints_by_steps_minutes_and_shards():
    run = limits(checkpointing_steps=3)
    run.state.completed_steps = 3
    assert run.checkpoint_due(0, 0)
    run = limits(clock=Clock(0.34), checkpointing_minutes=10)
    run.state.completed_steps = 1
    assert run.checkpoint_due(0, 0.33) and not run.checkpoint_due(0, 0.335)
    run = limits(num_epochs_between_checkpoints=2, checkpointing_minutes=0)
    run.state.completed_steps, run.state.consumed_rows = 1, 201
    assert run.checkpoint_due(199, 0) and not run.checkpoint_due(200, 0)


@pytest.mark.parametrize(
    ("batch", "device", "ranks", "cut"), [(32, 32, 1, (32, 1)), (4096, 32, 2, (32, 64)), (8, 32, 2, (4, 1))]
)
def test_the_cut_of_the_global_batch(batch, device, ranks, cut):
    assert cut_global_batch(batch, device, ranks) == cut


@pytest.mark.parametrize(("batch", "device", "ranks"), [(9, 2, 1), (7, 4, 2), (100, 32, 1)])
def test_a_batch_that_cannot_be_cut(batch, device, ranks):
    with pytest.raises(UserError, match=f"--train_batch_size {batch}"):
        cut_global_batch(batch, device, ranks)


@pytest.mark.parametrize("mode", ["post-ln", "electra"])
def test_flops_equal_what_torch_counts(mode):
    """Forward and backward of our model, counted operation by operation."""
    from test_electra import judged_batch
    from test_models import B, S, build, packed_batch
    from torch.utils.flop_counter import FlopCounterMode, addmm_flop

    model, batch = build(mode, "plain").train(), packed_batch().batch
    targets, sampling = batch["masked_positions"].numel(), 0
    if mode == "electra":
        batch |= judged_batch(batch)
        sampling = 2 * targets * 128 * model.config.vocab_size  # the output's product once more, for the draws
    in_place = {torch.ops.aten.addmm_: lambda *shapes, **_: addmm_flop(*shapes)}  # which it does not count by itself
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model(**batch).loss.backward()
    assert counter.get_total_flops() - sampling == masked_flops(model.config, B * S, targets, S)
