"""Pretrain a BERT-family model on masked-language modelling under a wall-clock budget.

    bash scripts/run_pretraining.sh                                  # 5 minutes on whatever is there
    python run_pretraining.py --total_training_time 1 --train_file corpus.txt
    accelerate launch --config_file accelerate_configs/ddp.yaml run_pretraining.py --max_train_steps 1000

Every flag: python run_pretraining.py --help. Parallelism comes from the YAML alone.
"""

from common.memory_settings import restart_with_memory_settings

if __name__ == "__main__":
    restart_with_memory_settings()  # before the large imports

import math
import os
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import transformers
from accelerate.utils import set_seed

from common import parallel, run_folder
from common.arguments import parse_pretraining_arguments
from common.batch_size import cut_global_batch, find_batch_size
from common.checkpoint import read_state, resolve_checkpoint, save_checkpoint
from common.clock import BudgetClock, read_readings
from common.data.batches import EvalBatches, Masking, TrainBatches, to_device
from common.data.packing import build_rows
from common.data.prepare import prepare_corpus
from common.errors import run_main
from common.limits import Limits, due
from common.mlm_report import report
from common.models.attention import fastest_attention
from common.models.layers import use_attention
from common.models.mlm import build_mlm_model
from common.optimizers import build_optimizer
from common.parallel.state import bytes_per_rank, load_training_state, plain_model, save_training_state
from common.progress import Progress
from common.report import MetricsLog
from common.resume import resume_settings
from common.schedulers import LRScheduler, learning_rate_factor
from common.stop import StopSignals
from common.training import StepLog, TrainState, evaluate, refuse_infinite_weights, save_pretrained
from common.unigram import start_from_frequencies, unigram_baseline
from common.utilisation import Meter

LAST_LOG = ("time budget spent", "all steps done")  # a run stopped by a signal goes on, and logs when it is due


def main():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model_args, data_args, args, notes = parse_pretraining_arguments()
    run_folder.check_run_folder(args)
    if args.check_arguments:
        return check(model_args, data_args, args)
    if run_folder.is_finished(args):
        print(f"{args.output_dir} is finished: nothing to do (a longer budget continues it)")
        return 0
    stop = StopSignals()
    accelerator = parallel.make_accelerator(args.precision, args.report_to)  # the strategy that the YAML names
    say = partial(print, flush=True) if accelerator.is_main_process else lambda *_, **__: None
    in_force = parallel.describe(accelerator)
    say(*notes, "strategy: {strategy}, {world_size} process(es), {precision}, {device}".format(**in_force), sep="\n")
    output_dir = Path(parallel.on_main(accelerator, lambda: args.output_dir or run_folder.make_run_folder()))
    agree_max = parallel.agree_max(accelerator)
    rank, ranks = parallel.data_rank(accelerator)
    here = {"rank": rank, "ranks": ranks, "device": accelerator.device}

    # ---- Data, model, optimizer ------------------------------------------------------------------
    corpus, rows, eval_rows = parallel.main_first(accelerator, partial(prepare_rows, data_args, say))
    masking = Masking.for_tokenizer(corpus.tokenizer, data_args.mlm_probability)
    eval_batches = EvalBatches(eval_rows, masking, data_args.max_eval_samples, args.per_device_eval_batch_size, **here)
    set_seed(args.seed)
    model = build_mlm_model(model_args, data_args, corpus.tokenizer)
    if model_args.init_output_bias == "unigram" and not model_args.model_name_or_path:
        start_from_frequencies(model, corpus.train)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    config, parameters = model.config, model.num_parameters()
    compiling = accelerator.device.type == "cuda" if args.torch_compile is None else args.torch_compile
    if compiling:  # before it is wrapped, so that what a strategy does around it stays outside
        model.compile(fullgraph=True, dynamic=False)
    optimizer = build_optimizer(model, args)
    model, optimizer = accelerator.prepare(model.train(), optimizer)

    # ---- The global batch, cut into what fits a device -------------------------------------------
    stream = partial(TrainBatches, rows, masking, args.seed, **here)
    per_device, accumulation = cut_global_batch(args.train_batch_size, args.per_device_train_batch_size, ranks)
    attention = model_args.attn_implementation
    if args.auto_find_batch_size:
        use_attention(plain_model(model), "plain" if attention == "auto" else attention)  # plain needs the most memory
        first_batch = lambda size: next(stream(batch_size=size, accumulation=1).micro_batches())[0]  # noqa: E731
        try_batch = lambda size: to_device(first_batch(size), accelerator.device)  # noqa: E731
        per_device = find_batch_size(accelerator, model, try_batch, per_device, agree_max)
        per_device, accumulation = cut_global_batch(args.train_batch_size, per_device, ranks)
    accelerator.gradient_accumulation_steps = accumulation
    say(f"output: {output_dir}")
    if args.replay_clock:
        say(f"note: times are replayed from {args.replay_clock}, not measured")
    say(
        f"model: {model_args.model_name_or_path or config.model_type}, {parameters:,} parameters; "
        f"{len(rows):,} rows of {data_args.max_seq_length} tokens; global batch {args.train_batch_size} rows = "
        f"{per_device} per device x {accumulation} accumulation x {ranks} process(es)"
    )

    # ---- Everything a resumed run must remember --------------------------------------------------
    settings = resume_settings(model_args, data_args, args)
    settings |= {"corpus": corpus.fingerprint, "precision": in_force["precision"], **shape_of(config)}
    clock = BudgetClock(
        args.total_training_time,
        agree_max,
        args.early_exit_time_marker,
        accelerator.is_main_process,
        output_dir / run_folder.READINGS,
        args.replay_clock,
    )
    state, validation_owed, begun = TrainState(), False, None
    limits = Limits(args, len(rows), clock, state)
    curve = {"curve": args.lr_scheduler_type, "min_lr_ratio": args.min_lr_ratio, **args.curve_options}
    factor = partial(learning_rate_factor, warmup_proportion=limits.warmup_proportion, **curve)
    lr_scheduler = LRScheduler(optimizer, factor)  # before the optimizer's state, which has its own rates, is loaded
    checkpoint = parallel.on_main(accelerator, lambda: run_folder.open_run_folder(output_dir, args, settings))
    metrics_log = MetricsLog(output_dir / run_folder.METRICS, accelerator.is_main_process)
    if checkpoint is None and args.resume_from_checkpoint:
        say(f"{output_dir} has no complete checkpoint: starting from the beginning")
    elif checkpoint is not None:
        load_training_state(accelerator, model, optimizer, checkpoint)
        saved = read_state(checkpoint)
        vars(state).update(saved["train"])
        validation_owed, begun = saved["validation_owed"], saved["log"]
        attention = saved["attention"] if attention == "auto" else attention
        clock.load_state_dict(saved["clock"])
        metrics_log.truncate_after(state.completed_steps)
        say(f"continuing from {checkpoint}: step {state.completed_steps:,}, {clock.used_hours:.3f} hours used")
        for name in settings:
            if settings[name] != saved["settings"][name]:
                say(f"note: {name} is now {settings[name]}; it was {saved['settings'][name]}")
    if attention == "auto":
        shape = (config, per_device, data_args.max_seq_length, data_args.packing == "documents")
        attention, seconds = parallel.on_main(accelerator, lambda: fastest_attention(accelerator, *shape))
        measured = ", ".join(f"{name} {1000 * time:.1f} ms" for name, time in seconds.items())
        say(f"attention: {attention} (forward and backward: {measured})")
    use_attention(plain_model(model), attention)
    command = os.environ.get("FRUGAL_COMMAND") or shlex.join(["python", *sys.argv])  # as the user typed it
    facts = {"model": vars(model_args), "data": vars(data_args), "training": vars(args), "command": command} | in_force
    parallel.on_main(accelerator, lambda: run_folder.write_arguments(output_dir, facts))
    parallel.on_main(accelerator, lambda: corpus.tokenizer.save_pretrained(output_dir) and None)  # for its checkpoints
    batches = stream(batch_size=per_device, accumulation=accumulation, consumed_rows=state.consumed_rows)
    parallel.start_tracker(accelerator, output_dir, args.project_name, args.job_name or output_dir.name, settings)

    # ---- What the loop does now and then ---------------------------------------------------------
    meter = Meter(config, batches, accelerator.device, in_force["precision"], ranks)
    bar = Progress(accelerator.is_main_process, "pretraining")

    def log_row(metrics):
        where = {"step": state.completed_steps, "hours": clock.used_hours, "tokens": state.consumed_tokens}
        metrics_log.write(where | metrics)
        accelerator.log(metrics, step=state.completed_steps)

    def validate():
        with step_log.paused():
            evaluation = evaluate(accelerator, model, eval_batches)
        log_row(evaluation)
        loss, accuracy = evaluation["eval_loss"], evaluation["eval_accuracy"]
        bar.note(f"step {state.completed_steps:,}: held-out loss {loss:.4f}, accuracy {accuracy:.2%}")
        return evaluation

    def save_state():
        with step_log.paused():
            refuse_infinite_weights(model, state.completed_steps)
            values = {"train": vars(state), "clock": clock.state_dict(), "log": step_log.state()}
            values |= {"settings": settings, "validation_owed": validation_owed, "attention": attention}
            write = partial(save_training_state, accelerator, model, optimizer)
            save_checkpoint(accelerator, output_dir, state.completed_steps, write, values, args.save_total_limit)
        return state.completed_steps

    # ---- Train until the budget is spent -----------------------------------------------------------
    reason, evaluation, grad_norm, loss_now, speed = limits.reached, None, None, None, None
    saved_at = state.completed_steps if checkpoint is not None else None
    lr_scheduler.step(limits.schedule_progress)
    stop.listen()  # from here on a signal waits for the end of a step
    clock.start()
    step_log = StepLog(accelerator, begun)
    if compiling:
        say("compiling the model: the first step takes long, and counts")
    if validation_owed:  # a signal came before it could be made
        validate()
    for batch, number, tokens in batches if not reason else ():
        with accelerator.accumulate(model):
            parallel.seed_dropout(args.seed, state.completed_steps, number)
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients and args.max_grad_norm > 0:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            if optimizer.step_was_skipped:  # fp16 overflow, which its loss scale answers
                grad_norm = None
            optimizer.zero_grad()
        step_log.add(loss)
        if not accelerator.sync_gradients:
            continue  # below: once per optimizer step

        rows_before, hours_before, evaluation = state.consumed_rows, clock.used_hours, None
        state.finish_step(args.train_batch_size, tokens)
        step_log.finish_step(state.completed_steps, grad_norm, tokens)
        clock.tick(stop.requested)
        if compiling:
            bar.note(f"compiled; the first step took {3600 * (clock.used_hours - hours_before):.0f} s")
            compiling = False
        learning_rate = lr_scheduler.get_last_lr()[0]
        lr_scheduler.step(limits.schedule_progress)  # of the next step
        reason = "signal" if clock.stop else limits.reached

        if due(state.completed_steps - 1, state.completed_steps, args.logging_steps) or reason in LAST_LOG:
            metrics, interval = step_log.pop()  # waits for the device; raises on NaN
            metrics |= meter.measure(**interval)
            log_row(metrics | {"learning_rate": learning_rate, "epoch": state.consumed_rows / len(rows)})
            loss_now, speed = metrics["loss"], metrics["tokens_per_second"]
        used_seconds = clock.used_hours * 3600
        bar.update(limits.share, used_seconds, limits.remaining_seconds, state.completed_steps, loss_now, speed)
        validation_owed = limits.validation_due(rows_before) and reason == "signal"
        if limits.validation_due(rows_before) and not reason:
            evaluation = validate()
            if limits.is_hopeless(evaluation["eval_loss"]):
                reason = "early stopping"
        for marker in clock.passed(args.time_markers):
            with step_log.paused():
                refuse_infinite_weights(model, state.completed_steps)
                save_pretrained(accelerator, model, corpus.tokenizer, output_dir / f"marker_{marker:g}")
            bar.note(f"step {state.completed_steps:,}: model saved in {output_dir / f'marker_{marker:g}'}")
        if limits.checkpoint_due(rows_before, hours_before) and not reason:
            saved_at = save_state()
        if reason:
            break
    bar.close()

    # ---- Save, judge, report -----------------------------------------------------------------------
    if saved_at != state.completed_steps:
        save_state()
    if reason == "signal":
        say(
            f"stopped and saved at step {state.completed_steps:,}; to continue, give the same flags with "
            f"--output_dir {output_dir} --resume_from_checkpoint latest"
        )
        parallel.shut_down(accelerator)
        return 128 + clock.stop
    say(f"training ended ({reason}); validating on {len(eval_batches.chosen):,} held-out rows, then saving")
    results = evaluation or validate()
    save_pretrained(accelerator, model, corpus.tokenizer, output_dir)
    parameter_bytes, optimizer_bytes = bytes_per_rank(model, optimizer)
    results |= in_force | meter.totals()
    results |= {
        "perplexity": math.exp(results["eval_loss"]),
        "train_loss": loss_now,
        "train_steps": state.completed_steps,
        "train_tokens": state.consumed_tokens,
        "train_runtime": clock.used_hours * 3600,
        "epoch": state.consumed_rows / len(rows),
        "parameter_bytes_per_rank": parameter_bytes,
        "optimizer_bytes_per_rank": optimizer_bytes,
        "stop_reason": reason,
    }
    if accelerator.is_main_process:
        results |= unigram_baseline(corpus.train, masking.vocab_size, eval_batches)
        report(output_dir, results, corpus, config, command, meter.peak)
    parallel.shut_down(accelerator)
    return 0


def check(model_args, data_args, args):
    """--check_arguments: everything that can fail before training does so here; the text is prepared."""
    parallel.check_launch(args.precision, args.report_to, args.torch_compile)
    cut_global_batch(args.train_batch_size, args.per_device_train_batch_size, parallel.launched_processes())
    if args.replay_clock:
        read_readings(args.replay_clock)
    if args.resume_from_checkpoint:
        resolve_checkpoint(args.resume_from_checkpoint, args.output_dir)
    corpus, *_ = prepare_rows(data_args, print)
    build_optimizer(build_mlm_model(model_args, data_args, corpus.tokenizer), args)
    return 0


def shape_of(config):
    """What a checkpoint's weights must fit."""
    names = (
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
    )
    return {f"model {name}": getattr(config, name) for name in (*names, "max_position_embeddings")}


def prepare_rows(data_args, say, first=True):
    """The corpus that the flags name, and its rows for training and validation.

    Only the first process overwrites a cache; the others use what it made.
    """
    corpus = prepare_corpus(replace(data_args, overwrite_cache=data_args.overwrite_cache and first), say)
    rows = (
        build_rows(part, corpus.tokenizer, data_args.max_seq_length, data_args.packing, corpus.rows_folder / name)
        for name, part in (("train", corpus.train), ("validation", corpus.validation))
    )
    return corpus, *rows


if __name__ == "__main__":
    run_main(main)
