"""A run in progress: what every entry script does around its steps.

Its folder, its clock and limits, the learning rate, the log, validation and checkpoints. The steps themselves, and
what they compute, stay in the script.
"""

import contextlib
from functools import partial

from common import parallel, run_folder
from common.checkpoint import read_state, save_checkpoint
from common.clock import BudgetClock
from common.curvature import Curvature
from common.curve_files import chosen_curve
from common.limits import WARM_UP_STEPS, Limits, due
from common.optimizers import estimates_curvature
from common.parallel.state import bytes_per_rank, load_training_state, save_training_state
from common.progress import Progress
from common.report import MetricsLog, perplexity, write_all_results
from common.resume import saved_settings
from common.schedulers import LRScheduler, learning_rate_factor
from common.stage_report import STAGE_LINE, TIMELINE, write_stage_report
from common.stop import StopSignals
from common.training import StepLog, TrainState, evaluate, judged_weights, refuse_infinite_weights, save_pretrained
from common.utilisation import peak_memory_bytes
from common.weight_average import WeightAverage

LAST_LOG = ("time budget spent", "all steps done")  # a run stopped by a signal goes on, and logs when it is due


class Run:
    """What a training loop shares with all others, from the moment the model is prepared.

    Args:
        accelerator, model, optimizer: as accelerator.prepare returned the last two.
        args: common.arguments.TrainingArguments.
        rows: number of rows in one pass over the data.
        settings: common.resume.Settings, plain values that a continued run must share with its checkpoint.
        output_dir: Path; say: function that prints on the main process.
        stop: StopSignals.
        ema_decay: of an average of the weights, which is saved beside the model; None = there is none.
    Attributes:
        state: TrainState; clock: BudgetClock; limits: Limits; log: StepLog of the losses.
        saved: what the checkpoint it continues from remembers, {} where it begins.
        remembered: dict that goes into every checkpoint beside what a run keeps by itself.
        reason: why the run is over, None while it is not.
    Raises:
        UserError: a checkpoint that does not exist, is damaged, or belongs to other settings.
    """

    def __init__(
        self, accelerator, model, optimizer, args, rows, settings, output_dir, say, stop: StopSignals, ema_decay=None
    ):
        self.accelerator, self.model, self.optimizer, self.args = accelerator, model, optimizer, args
        self.rows, self.settings, self.output_dir, self.say, self.stop = rows, settings, output_dir, say, stop
        main = accelerator.is_main_process
        if args.replay_clock:
            say(f"note: times are replayed from {args.replay_clock}, not measured")
        self.clock = BudgetClock(
            args.total_training_time,
            parallel.agree_max(accelerator),
            args.early_exit_time_marker,
            main,
            output_dir / run_folder.READINGS,
            args.replay_clock,
        )
        self.state, self.saved, self.remembered = TrainState(), {}, {}
        self.limits = Limits(args, rows, self.clock, self.state)
        curve, options = chosen_curve(args, self.limits.after_warmup)
        warm = {"warmup_proportion": self.limits.warmup_proportion, "min_lr_ratio": args.min_lr_ratio}
        factor = partial(learning_rate_factor, curve=curve, **warm, **options)
        self.lr_scheduler = LRScheduler(optimizer, factor)  # before the optimizer's state, which has its own rates
        self.metrics_log = MetricsLog(output_dir / run_folder.METRICS, main)
        self.validation_owed, self.last_saved, self.evaluation = False, None, None
        self.loss_now, self.speed = None, None
        self.average = WeightAverage(accelerator, model, ema_decay) if ema_decay else None
        estimated = estimates_curvature(optimizer.optimizer)
        self.curvature = Curvature(accelerator, model, optimizer, args.seed) if estimated else None
        self._continue(parallel.on_main(accelerator, lambda: run_folder.open_run_folder(output_dir, args, settings)))
        self.reason = self.limits.reached

    def _continue(self, checkpoint):
        if checkpoint is None:
            if self.args.resume_from_checkpoint:
                self.say(f"{self.output_dir} has no complete checkpoint: starting from the beginning")
            return
        if self.average:
            self.average.load(checkpoint)
        load_training_state(self.accelerator, self.model, self.optimizer, checkpoint)
        self.saved = read_state(checkpoint)
        vars(self.state).update(self.saved["train"])
        self.validation_owed, self.last_saved = self.saved["validation_owed"], self.state.completed_steps
        self.clock.load_state_dict(self.saved["clock"])
        self.metrics_log.truncate_after(self.state.completed_steps)
        used = f"step {self.state.completed_steps:,}, {self.clock.used_hours:.3f} hours used"
        self.say(f"continuing from {checkpoint}: {used}")
        before = saved_settings(self.saved["settings"], self.settings)
        for name, value in self.settings.items():
            if value != before[name]:
                self.say(f"note: {name} is now {value}; it was {before[name]}")

    def steps(self, batches, eval_batches, tokenizer, meter, label, compiling=False, cap=None):
        """Yield what `batches` yields until a limit is reached or a signal comes; the caller makes the steps.

        Args:
            batches: TrainBatches; eval_batches: EvalBatches; tokenizer: saved with the model at markers, or None.
            meter: common.utilisation.Meter; label: word in front of the progress bar.
            compiling: whether the first step will compile the model.
            cap: function called after every step, which raises where the process is too large; or None.
        """
        self.eval_batches, self.tokenizer, self.meter, self.cap = eval_batches, tokenizer, meter, cap
        self.batches = batches
        self.bar, self.compiling = Progress(self.accelerator.is_main_process, label), compiling
        estimated = self.curvature.before_steps if self.curvature else lambda stream, _: stream
        self.lr_scheduler.step(self.limits.schedule_progress)
        self.stop.listen()  # from here on a signal waits for the end of a step
        self.clock.start()
        self.log = StepLog(self.accelerator, self.saved.get("log"))
        if compiling:
            self.say("compiling the model: the first step takes long, and counts")
        self._begin_step()
        if self.validation_owed:  # a signal came before it could be made
            self.validate()
        if not self.reason:
            with contextlib.closing(iter(batches)) as stream:
                for item in estimated(stream, self.state.completed_steps):
                    yield item
                    if self.reason:
                        break
        self.bar.close()

    def finish_step(self, grad_norm, tokens, skipped=False):
        """Close an optimizer step: time, learning rate, log, and what is due now and then.

        Args:
            grad_norm: scalar tensor, or None where nothing was clipped; tokens: real tokens in the global batch.
            skipped: whether the gradients overflowed in fp16 and nothing was updated. That is no step: the loss scale
                is halved, and the next rows are tried.
        Raises:
            DivergedError: many in a row.
        """
        if skipped:
            self._skip_step()
            return
        args, state, clock, limits = self.args, self.state, self.clock, self.limits
        rows_before, hours_before, self.evaluation = state.consumed_rows, clock.used_hours, None
        state.finish_step(self.step_rows, tokens)
        self.log.finish_step(state.completed_steps, grad_norm, tokens, self.step_rows)
        if self.average:
            self.average.update(state.completed_steps)
        clock.tick(self.stop.requested)
        if self.compiling:
            self.bar.note(f"compiled; the first step took {3600 * (clock.used_hours - hours_before):.0f} s")
            self.compiling = False
        learning_rate = self.lr_scheduler.get_last_lr()[0]
        self.lr_scheduler.step(limits.schedule_progress)  # of the next step
        self.reason = "signal" if clock.stop else limits.reached
        if self.cap:
            parallel.raise_together(self.accelerator, self.cap)

        warm = args.throughput_steps is not None and state.completed_steps == WARM_UP_STEPS
        log_due = due(state.completed_steps - 1, state.completed_steps, args.logging_steps)
        stage_ends = self.batches.rows_at(limits.schedule_progress) is not self.batches.rows
        if log_due or self.reason in LAST_LOG or warm or stage_ends:  # a logged speed is of rows of one length
            metrics, interval = self.log.pop()  # waits for the device; raises on NaN
            metrics |= self.meter.measure(interval["rows"], interval["tokens"], interval["seconds"])
            if late := self.accelerator.steps_behind:
                metrics["loss_step"] = max(1, state.completed_steps - late)
            self.log_row(metrics | {"learning_rate": learning_rate, "epoch": state.consumed_rows / self.rows})
            self.loss_now, self.speed = metrics["loss"], metrics["tokens_per_second"]
        if warm:
            self.meter.restart()
            self.accelerator.record_passes()
        used, left = clock.used_hours * 3600, limits.remaining_seconds
        self.bar.update(limits.share, used, left, state.completed_steps, self.loss_now, self.speed)
        self.validation_owed = limits.validation_due(rows_before) and self.reason == "signal"
        if limits.validation_due(rows_before) and not self.reason:
            self.evaluation = self.validate()
            if limits.is_hopeless(self.evaluation["eval_loss"]):
                self.reason = "early stopping"
        for marker in clock.passed(args.time_markers):
            folder = self.output_dir / f"marker_{marker:g}"
            with self.log.paused():
                refuse_infinite_weights(self.accelerator, self.model, state.completed_steps)
                self.save_pretrained(folder)
            self.bar.note(f"step {state.completed_steps:,}: model saved in {folder}")
        if limits.checkpoint_due(rows_before, hours_before) and not self.reason:
            self.save_state()
        self._begin_step()

    def _begin_step(self):
        """Let the data and the strategy make ready for the next step: its length of rows, its micro-batches."""
        consumed, rows = self.state.consumed_rows, self.batches.rows
        self.step_rows, accumulation = self.batches.next_step(consumed, self.limits.schedule_progress)
        if rows is not self.batches.rows:
            self.bar.note(f"after step {self.state.completed_steps:,}: rows of {self.batches.rows.seq_length} tokens")
        if accumulation != self.accelerator.gradient_accumulation_steps:
            parallel.set_accumulation(self.accelerator, accumulation)
            self.bar.note(f"after step {self.state.completed_steps:,}: global batch {self.step_rows:,} rows")

    def _skip_step(self):
        self.log.drop_step(self.state.completed_steps)
        self.state.consumed_rows += self.step_rows
        self.clock.tick(self.stop.requested)
        self.reason = "signal" if self.clock.stop else self.limits.reached
        self._begin_step()

    def log_row(self, metrics):
        """Write a row of metrics.jsonl, and to the tracker. Args: metrics: dict."""
        step, tokens = self.state.completed_steps, self.state.consumed_tokens
        self.metrics_log.write({"step": step, "hours": self.clock.used_hours, "tokens": tokens} | metrics)
        self.accelerator.log(metrics, step=step)

    def validate(self):
        """Judge the model on the held-out rows, and log it. Returns: dict, as common.training.evaluate."""
        with self.log.paused(), judged_weights(self.accelerator, self.model, self.optimizer):
            evaluation = evaluate(self.accelerator, self.model, self.eval_batches)
        self.log_row(evaluation)
        loss, accuracy = evaluation["eval_loss"], evaluation["eval_accuracy"]
        pairs = f", of pairs {evaluation['eval_sentence_accuracy']:.2%}" if "eval_sentence_loss" in evaluation else ""
        if "eval_discriminator_loss" in evaluation:
            pairs += ", of the discriminator {eval_discriminator_accuracy:.2%}".format(**evaluation)
        self.bar.note(f"step {self.state.completed_steps:,}: held-out loss {loss:.4f}, accuracy {accuracy:.2%}{pairs}")
        return evaluation

    def save_pretrained(self, folder):
        """Write the model that is judged, as common.training.save_pretrained."""
        with judged_weights(self.accelerator, self.model, self.optimizer):
            save_pretrained(self.accelerator, self.model, self.tokenizer, folder)

    def save_state(self):
        """Write a checkpoint of this step."""
        with self.log.paused():
            refuse_infinite_weights(self.accelerator, self.model, self.state.completed_steps)
            values = {"train": vars(self.state), "clock": self.clock.state_dict(), "log": self.log.state()}
            values |= {"settings": self.settings, "validation_owed": self.validation_owed, **self.remembered}
            steps, limit = self.state.completed_steps, self.args.save_total_limit
            save_checkpoint(self.accelerator, self.output_dir, steps, self._write_state, values, limit)
        self.last_saved = self.state.completed_steps

    def _write_state(self, folder):
        save_training_state(self.accelerator, self.model, self.optimizer, folder)
        if self.average:
            self.average.save(folder)

    def stopped(self):
        """Save what a signal has interrupted.

        Returns:
            int: the exit code, or None where the run has come to its end.
        """
        if self.last_saved != self.state.completed_steps:
            self.save_state()
        if self.reason != "signal":
            return None
        self.say(
            f"stopped and saved at step {self.state.completed_steps:,}; to continue, give the same flags with "
            f"--output_dir {self.output_dir} --resume_from_checkpoint latest"
        )
        parallel.shut_down(self.accelerator)
        return 128 + self.clock.stop

    def results(self):
        """Validate and save the finished model. Returns: dict for all_results.json."""
        number = len(self.eval_batches.chosen)
        self.say(f"training ended ({self.reason}); validating on {number:,} held-out rows, then saving")
        results = self.evaluation or self.validate()
        self.save_pretrained(self.output_dir)
        if self.average:
            with self.average.in_place():
                judged = evaluate(self.accelerator, self.model, self.eval_batches)
                save_pretrained(self.accelerator, self.model, self.tokenizer, self.output_dir / run_folder.AVERAGE)
            results = results | {f"ema_{name}": value for name, value in judged.items()}
            loss, folder = judged["eval_loss"], self.output_dir / run_folder.AVERAGE
            self.say(f"average of the weights: held-out loss {loss:.4f}, saved in {folder}")
        return results | {"perplexity": perplexity(results["eval_loss"])} | self._figures() | self.meter.totals()

    def report_throughput(self, in_force):
        """What --throughput_steps ends with, in place of a model: a line for people and all_results.json.

        Args:
            in_force: dict, as parallel.describe.
        """
        passes = self.accelerator.passes({"peak_memory_bytes": peak_memory_bytes(self.accelerator.device)})
        results = in_force | self._figures() | self.meter.throughput(self.args.gradient_checkpointing)
        if passes and self.accelerator.is_main_process:
            stages = write_stage_report(self.output_dir, passes, in_force["strategy"])
            results["bubble_share"] = stages["bubble_share"]
            self.say(
                *(STAGE_LINE.format(**row) for row in stages["stages"]),
                f"timeline: {self.output_dir / TIMELINE}",
                sep="\n",
            )
        if self.accelerator.is_main_process:
            write_all_results(self.output_dir / run_folder.RESULTS, results)
        lines = (
            f"throughput over {self.args.throughput_steps} steps, after {WARM_UP_STEPS} to warm up:",
            "  {tokens_per_second:,.0f} tokens/s, {samples_per_second:,.2f} samples/s (rows)",
            "  {model_tflops_per_device:.4f} model TFLOP/s per device: " + self.meter.formula,
            "  {hardware_tflops_per_device:.4f} hardware TFLOP/s per device: the same, and the layers' forward pass "
            "once more with --gradient_checkpointing",
            f"  peak memory {results['peak_memory_bytes'] / 1e9:.2f} GB per process",
        )
        self.say(*(line.format(**results) for line in lines), sep="\n")
        parallel.shut_down(self.accelerator)

    def _figures(self):
        parameter_bytes, optimizer_bytes = bytes_per_rank(self.accelerator, self.model, self.optimizer)
        return {
            "train_loss": self.loss_now,
            "train_steps": self.state.completed_steps,
            "train_tokens": self.state.consumed_tokens,
            "train_runtime": self.clock.used_hours * 3600,
            "epoch": self.state.consumed_rows / self.rows,
            "parameter_bytes_per_rank": parameter_bytes,
            "optimizer_bytes_per_rank": optimizer_bytes,
            "stop_reason": self.reason,
        }
