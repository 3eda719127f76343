"""Fine-tune an encoder checkpoint on a GLUE task, or a task of your own, score it, and predict the test split.

    python run_glue.py --model_name_or_path runs/20261121-024340 --task_name mrpc --data_dir glue_data \\
        --do_train --do_eval --output_dir runs/mrpc
    accelerate launch --config_file accelerate_configs/ddp.yaml run_glue.py ...

Every flag: python run_glue.py --help. Parallelism comes from the YAML alone.
"""

from common.memory_settings import restart_with_memory_settings

if __name__ == "__main__":
    restart_with_memory_settings()  # before the large imports

import math
from dataclasses import asdict
from functools import partial
from pathlib import Path

import transformers
from accelerate.utils import set_seed

from common import parallel, run_folder
from common.batch_size import cut_global_batch
from common.checkpoint import read_state, resolve_checkpoint, save_checkpoint
from common.data.examples import GroupedBatches, encode_examples
from common.data.glue_splits import read_splits
from common.data.tokenizers import load_tokenizer
from common.errors import UserError, run_main
from common.eval_plot import write_eval_plot
from common.glue_arguments import parse_glue_arguments
from common.limits import due
from common.models.classifier import build_classifier
from common.models.recompute import recompute_layers
from common.optimizers import build_optimizer
from common.parallel.state import load_training_state, save_training_state
from common.predictions import predict, score, write_predictions
from common.progress import Progress
from common.report import MetricsLog, write_all_results
from common.schedulers import LRScheduler, learning_rate_factor
from common.stop import StopSignals
from common.training import StepLog, TrainState, judged_weights, refuse_infinite_weights, save_pretrained
from common.utilisation import peak_memory_bytes


def main():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model_args, data_args, args, notes = parse_glue_arguments()
    run_folder.follow_restart(args)
    run_folder.check_run_folder(args)
    parallel.refuse_delay()
    if args.check_arguments:
        return check(model_args, data_args, args)
    if args.resume_from_checkpoint == "latest" and (Path(args.output_dir) / run_folder.RESULTS).exists():
        print(f"{args.output_dir} is finished: nothing to do")
        return 0
    stop = StopSignals()
    accelerator = parallel.make_accelerator(args.precision, pipeline_config=args.pipeline_config)  # by the YAML
    say = partial(print, flush=True) if accelerator.is_main_process else lambda *_, **__: None
    in_force = parallel.describe(accelerator)
    say(*notes, "strategy: {strategy}, {world_size} process(es), {precision}, {device}".format(**in_force), sep="\n")
    output_dir = Path(args.output_dir)
    rank, ranks = parallel.data_rank(accelerator)

    # ---- Data, model -----------------------------------------------------------------------------
    how = {"load": parallel.loader(accelerator), "build": parallel.builder(accelerator)}
    task, splits, model, tokenizer = load(model_args, data_args, args, how if args.do_train else {})
    encode = partial(
        encode_examples,
        task=task,
        tokenizer=tokenizer,
        max_seq_length=data_args.max_seq_length,
        pad_to_max_length=data_args.pad_to_max_length,
    )
    train = encode(splits.train) if args.do_train else None
    validation = {suffix: encode(examples) for suffix, examples in splits.validation.items()}
    if args.gradient_checkpointing:
        recompute_layers(model)
    say(f"model: {model_args.model_name_or_path}, {model.num_parameters():,} parameters; task {task.name}")
    look = partial(predict, accelerator, batch_size=args.per_device_eval_batch_size, rank=rank, ranks=ranks)

    def validate():
        """Metrics of every validation split, and the outputs they were computed from."""
        outputs = {suffix: look(model, examples) for suffix, examples in validation.items()}
        parts = (score(task, outputs[suffix], validation[suffix].labels, suffix) for suffix in outputs)
        return {name: value for part in parts for name, value in part.items()}, outputs

    results = {"task": task.name, **in_force}
    if args.do_train:
        # ---- Optimizer, schedule, everything a resumed run must remember ---------------------------
        per_device, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        if args.train_batch_size:
            per_device, accumulation = cut_global_batch(args.train_batch_size, per_device, ranks)
        parallel.set_batch(accelerator, per_device, accumulation, args.max_grad_norm)
        here = {"rank": rank, "ranks": ranks, "device": accelerator.device}
        batches = GroupedBatches(train, args.seed, per_device, accumulation, **here)
        total_steps = args.max_train_steps or math.ceil(args.num_train_epochs * batches.steps_per_epoch)
        optimizer = build_optimizer(model, args, in_force["precision"])
        model, optimizer = accelerator.prepare(model.train(), optimizer)
        warmup = args.warmup_ratio if args.warmup_steps is None else min(1.0, args.warmup_steps / total_steps)
        curve = partial(learning_rate_factor, curve=args.lr_scheduler_type, warmup_proportion=warmup)
        lr_scheduler = LRScheduler(optimizer, curve)
        state = TrainState()
        settings = {
            "task": task.name,
            "global batch": batches.global_batch,
            "steps": total_steps,
            "training rows": len(train),
            "seed": args.seed,
            "max_seq_length": data_args.max_seq_length,
            "optimizer_type": args.optimizer_type,
            "learning_rate": args.learning_rate,
            "precision": in_force["precision"],
        }
        checkpoint = parallel.on_main(accelerator, lambda: run_folder.open_run_folder(output_dir, args, settings))
        metrics_log = MetricsLog(output_dir / run_folder.METRICS, accelerator.is_main_process)
        begun = None
        if checkpoint is not None:
            load_training_state(accelerator, model, optimizer, checkpoint)
            saved = read_state(checkpoint)
            vars(state).update(saved["train"])
            begun, batches.taken = saved["log"], state.consumed_rows // batches.global_batch
            metrics_log.truncate_after(state.completed_steps)
            say(f"continuing from {checkpoint}: step {state.completed_steps:,}")
        facts = {"model": asdict(model_args), "data": asdict(data_args), "training": asdict(args)} | in_force
        parallel.on_main(accelerator, lambda: run_folder.write_arguments(output_dir, facts))
        say(
            f"{len(train):,} training rows; global batch {batches.global_batch} rows = {per_device} per device x "
            f"{accumulation} accumulation x {ranks} process(es); {total_steps:,} steps"
        )

        def save_state():
            with step_log.paused():
                refuse_infinite_weights(accelerator, model, state.completed_steps)
                values = {"train": vars(state), "log": step_log.state(), "settings": settings}
                write = partial(save_training_state, accelerator, model, optimizer)
                save_checkpoint(accelerator, output_dir, state.completed_steps, write, values, args.save_total_limit)

        # ---- Train -----------------------------------------------------------------------------------
        bar = Progress(accelerator.is_main_process, task.name)
        agree_max = parallel.agree_max(accelerator)
        step_log, grad_norm, loss_now, speed, signal = StepLog(accelerator, begun), None, None, None, 0
        totals = {"seconds": 0.0, "tokens": 0}
        first_step, seconds_left = state.completed_steps, None
        lr_scheduler.step(state.completed_steps / total_steps)
        stop.listen()  # from here on a signal waits for the end of a step
        for batch, number, tokens in batches if state.completed_steps < total_steps else ():
            with accelerator.accumulate(model):
                parallel.seed_dropout(args.seed, state.completed_steps, number)
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients and args.max_grad_norm > 0:
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            step_log.add(loss)
            if not accelerator.sync_gradients:
                continue  # below: once per optimizer step

            if optimizer.step_was_skipped:  # fp16's gradients overflowed
                step_log.drop_step(state.completed_steps)
                state.consumed_rows += batches.global_batch
                continue
            state.finish_step(batches.global_batch, tokens)
            step_log.finish_step(state.completed_steps, grad_norm, tokens, batches.global_batch)
            step, epochs = state.completed_steps, state.completed_steps / batches.steps_per_epoch
            learning_rate = lr_scheduler.get_last_lr()[0]
            lr_scheduler.step(step / total_steps)  # of the next step
            signal = int(agree_max([float(stop.requested)])[0])
            done = step >= total_steps
            if due(step - 1, step, args.logging_steps) or done:
                metrics, interval = step_log.pop()  # waits for the device; raises on NaN
                totals = {name: totals[name] + interval[name] for name in totals}
                loss_now, speed = metrics["loss"], interval["tokens"] / interval["seconds"]
                seconds_left = totals["seconds"] / (step - first_step) * (total_steps - step)
                row = {"step": step, "epoch": epochs, "learning_rate": learning_rate, "tokens_per_second": speed}
                metrics_log.write(row | metrics)
            bar.update(step / total_steps, totals["seconds"], seconds_left, step, loss_now, speed)
            every = {"steps": args.eval_steps, "epoch": batches.steps_per_epoch, "no": None}[args.eval_strategy]
            if due(step - 1, step, every) and not done and not signal:
                with step_log.paused(), judged_weights(accelerator, model, optimizer):
                    evaluation, _ = validate()
                metrics_log.write({"step": step, "epoch": epochs} | evaluation)
                bar.note(f"step {step:,}: " + shown(evaluation))
            save_every = {"steps": args.checkpointing_steps, "epoch": batches.steps_per_epoch}.get(args.save_strategy)
            if due(step - 1, step, save_every) or signal or (done and args.save_strategy != "no"):
                save_state()
            if done or signal:
                break
        bar.close()
        if signal:
            say(
                f"stopped and saved at step {state.completed_steps:,}; to continue, give the same flags with "
                "--resume_from_checkpoint latest"
            )
            parallel.shut_down(accelerator)
            return 128 + signal
        optimizer.eval()  # to the weights that are judged, where it averages those in training
        save_pretrained(accelerator, model, tokenizer, output_dir)
        results |= {
            "train_steps": state.completed_steps,
            "train_samples": len(train),
            "train_tokens": state.consumed_tokens,
            "train_loss": loss_now,
            "train_runtime": totals["seconds"],
            "tokens_per_second": totals["tokens"] / totals["seconds"] if totals["seconds"] else None,
        }
    else:
        model = accelerator.prepare(model)
        output_dir.mkdir(parents=True, exist_ok=True)

    # ---- Score, predict, report ------------------------------------------------------------------
    if args.do_eval:
        evaluation, outputs = validate()
        results |= evaluation
        if args.do_train and accelerator.is_main_process:
            metrics_log.write({"step": state.completed_steps} | evaluation)
        if accelerator.is_main_process:
            for suffix, examples in splits.validation.items():
                path = output_dir / f"eval_predictions{suffix}.tsv"
                labels = validation[suffix].labels
                write_predictions(path, task, examples, outputs[suffix], labels)
                scores = shown(score(task, outputs[suffix], labels, suffix))
                title = f"{task.name}{suffix}, {len(labels):,} examples"
                write_eval_plot(output_dir / f"eval_plot{suffix}.png", task, outputs[suffix], labels, title, scores)
    for suffix, examples in splits.test.items():
        outputs = look(model, encode(examples))
        if accelerator.is_main_process:
            write_predictions(output_dir / f"predict_results{suffix}.tsv", task, examples, outputs)
    results["peak_memory_bytes"] = peak_memory_bytes(accelerator.device)
    if accelerator.is_main_process:
        write_all_results(output_dir / run_folder.RESULTS, results)
        say(f"{task.name}: {shown(results) or 'done'}", f"results: {output_dir}", sep="\n")
    parallel.shut_down(accelerator)
    return 0


def check(model_args, data_args, args):
    """--check_arguments: everything that can fail before training does so here."""
    launch = parallel.check_launch(args.precision, "none", pipeline_config=args.pipeline_config)
    cut = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if args.train_batch_size:
        ranks = parallel.launched_data_ranks(args.pipeline_config)
        cut = cut_global_batch(args.train_batch_size, cut[0], ranks)
    parallel.check_micro_batches(launch.pipe, *cut)
    if args.resume_from_checkpoint:
        resolve_checkpoint(args.resume_from_checkpoint, args.output_dir)
    _, _, model, _ = load(model_args, data_args, args, {})
    parallel.check_cut(model, launch)
    parallel.check_optimizer(launch.engine, build_optimizer(model, args))
    return 0


def load(model_args, data_args, args, how):
    """The task, its rows, and the model and tokenizer for it.

    Args:
        how: as build_classifier's load and build; a model that is only judged is there whole.
    Returns:
        (Task, Splits, model, tokenizer).
    """
    task, splits = read_splits(data_args, args, model_args.cache_dir)
    set_seed(args.seed)  # of the head
    model = build_classifier(model_args, task, trained_head=not args.do_train, **how)
    name = model_args.tokenizer_name or tokenizer_of(model_args.model_name_or_path)
    tokenizer = load_tokenizer(name, model_args.cache_dir, model_args.trust_remote_code)
    if model.config.max_position_embeddings < data_args.max_seq_length:
        raise UserError(
            f"--max_seq_length {data_args.max_seq_length} is above the model's {model.config.max_position_embeddings} "
            "positions: shorten the rows"
        )
    return task, splits, model, tokenizer


def tokenizer_of(checkpoint):
    """Where a checkpoint's tokenizer is: with it, or, of a checkpoint in training, in the folder of its run."""
    path = Path(checkpoint)
    in_training = path.is_dir() and not any(path.glob("tokenizer*")) and any(path.parent.glob("tokenizer*"))
    return str(path.parent) if in_training else checkpoint


def shown(values):
    """The metrics among some values, on one line."""
    metrics = {name: value for name, value in values.items() if name.startswith("eval_") and "samples" not in name}
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


if __name__ == "__main__":
    run_main(main)
