"""What ends a run, how near it is, and what is due on the way."""

import math

WARM_UP_STEPS = 5  # before those that --throughput_steps measures


def due(before, now, every):
    """Whether a multiple of `every` lies in (before, now]; never where `every` is None or not positive."""
    return every is not None and every > 0 and math.floor(now / every) > math.floor(before / every)


class Limits:
    """The limits of a run: the clock's and a number of steps, whichever comes first.

    Args:
        args: common.arguments.TrainingArguments.
        rows: number of rows in one pass over the data.
        clock: common.clock.BudgetClock.
        state: common.training.TrainState.
    """

    def __init__(self, args, rows, clock, state):
        self.ramp = args.batch_ramp
        steps = [args.max_train_steps] if args.max_train_steps is not None else []
        if args.num_train_epochs is not None:
            steps.append(max(1, self.ramp.steps_for(math.ceil(args.num_train_epochs * rows))))
        self.max_steps = min(steps) if steps else None
        self.args, self.clock, self.state = args, clock, state
        self.rows_per_shard = max(args.train_batch_size, rows // args.shards_per_epoch)

    @property
    def total_rows(self):
        """Rows in all steps of the run; None where their number has no limit."""
        return self.max_steps and self.ramp.rows_after(self.max_steps)

    @property
    def reached(self):
        """Why the run is over, or None."""
        if self.clock.expired:
            return "time budget spent"
        return "all steps done" if self.max_steps and self.state.completed_steps >= self.max_steps else None

    @property
    def share(self):
        """How much of the nearest limit is used, in [0, 1]."""
        steps = self.state.completed_steps / self.max_steps if self.max_steps else 0.0
        return min(1.0, max(steps, self.clock.used_hours / self.clock.limit_hours))

    @property
    def schedule_progress(self):
        """How much of the learning-rate schedule is over, in [0, 1]: of the time, or of the steps."""
        if self.args.lr_schedule == "time":
            return self.clock.progress
        return min(1.0, self.state.completed_steps / self.max_steps)

    @property
    def warmup_proportion(self):
        """Warm-up as a share of the schedule, however it was given."""
        if self.args.num_warmup_steps is not None:
            return min(1.0, self.args.num_warmup_steps / self.max_steps)
        return self.args.warmup_proportion

    @property
    def after_warmup(self):
        """What the learning rate's curve is laid over: hours, or steps."""
        whole = self.args.total_training_time if self.args.lr_schedule == "time" else self.max_steps
        return whole * (1 - self.warmup_proportion)

    @property
    def remaining_seconds(self):
        """Time until the nearest limit at the speed so far; None before the first step."""
        used = self.clock.used_hours * 3600
        return used / self.share - used if self.share else None

    def validation_due(self, rows_before):
        """Whether to validate now: --eval_steps, or else ExtremeBERT's schedule in shards.

        Args:
            rows_before: rows consumed before the step that was just made.
        Source: ExtremeBERT, should_run_validation; a shard is 1/shards_per_epoch of the rows here.
        """
        args, steps = self.args, self.state.completed_steps
        if args.eval_steps is not None:
            return due(steps - 1, steps, args.eval_steps)
        if not args.do_validation:
            return False
        shards = args.validation_epochs
        if self.share < args.validation_begin_proportion:
            shards = args.validation_epochs_begin
        elif self.share > 1 - args.validation_end_proportion:
            shards = args.validation_epochs_end
        return due(rows_before, self.state.consumed_rows, shards * self.rows_per_shard)

    def checkpoint_due(self, rows_before, hours_before):
        """Whether to save now, by steps, minutes or shards.

        Args:
            rows_before, hours_before: rows consumed and hours used before the step that was just made.
        """
        args, steps = self.args, self.state.completed_steps
        return (
            due(steps - 1, steps, args.checkpointing_steps)
            or due(hours_before * 60, self.clock.used_hours * 60, args.checkpointing_minutes)
            or due(rows_before, self.state.consumed_rows, args.num_epochs_between_checkpoints * self.rows_per_shard)
        )

    def is_hopeless(self, eval_loss):
        """Whether --use_early_stopping ends the run at this validation loss."""
        late = self.clock.used_hours * 60 > self.args.early_stop_time
        return self.args.use_early_stopping and late and eval_loss > self.args.early_stop_eval_loss
