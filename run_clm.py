"""Train or fine-tune a causal language model (OPT, or any other of transformers) under a wall-clock budget.

    bash scripts/run_clm.sh 16 0 125m 1                              # 5 minutes of OPT-125m on whatever is there
    python run_clm.py --model_name_or_path facebook/opt-125m --train_file corpus.txt --num_train_epochs 1
    accelerate launch --config_file accelerate_configs/ddp.yaml run_clm.py --model_size 350m --max_train_steps 1000

Every flag: python run_clm.py --help. Parallelism comes from the YAML alone.
"""

from common.memory_settings import restart_with_memory_settings

if __name__ == "__main__":
    restart_with_memory_settings()  # before the large imports

import os
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import transformers
from accelerate.utils import set_seed

from common import parallel, run_folder
from common.batch_size import find_batch_size
from common.checkpoint import resolve_checkpoint
from common.clm_arguments import parse_clm_arguments
from common.clock import read_readings
from common.continuations import continuations
from common.data.batches import EvalBatches, NextToken, TrainBatches, to_device
from common.data.packing import Frame, build_rows
from common.data.prepare import prepare_corpus
from common.data.synthetic import EVAL_ROWS, TRAIN_ROWS, SyntheticRows
from common.data.tokenizers import CAUSAL as CAUSAL_TOKENIZER
from common.errors import run_main
from common.final_report import report
from common.limit_memory import refuse_above_cap, refuse_above_memory, set_memory_cap
from common.memory import Workload, estimate, format_estimate
from common.memory_plan import format_plan, planned
from common.models.causal import (
    attention_path,
    build_causal_lm,
    causal_config,
    fit_vocabulary,
    row_length,
    set_attention,
)
from common.models.footprint import optimizer_state
from common.models.liger import find_fused_loss, refuse_fused_loss, use_fused_loss
from common.models.recompute import recompute_layers
from common.models.whole import build_without_numbers
from common.optimizers import OPTIMIZERS, build_optimizer
from common.report import CAUSAL, write_all_results
from common.resume import resume_settings
from common.run import Run
from common.stop import StopSignals
from common.unigram import unigram_baseline
from common.utilisation import CAUSAL_FORMULA, Meter, causal_flops, resident_bytes

UNSAID = ("_name_or_path", "transformers_version", "dtype")  # of a configuration: the same model without them


def main():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model_args, data_args, args = parse_clm_arguments()
    run_folder.follow_restart(args)
    run_folder.check_run_folder(args)
    config = causal_config(model_args, data_args)
    data_args.block_size = row_length(config, data_args.block_size)
    if args.dry_run:
        return plan(config, model_args, data_args, args)
    parallel.check_flags(args.torch_compile, args.auto_find_batch_size)
    if args.check_arguments:
        return check(config, model_args, data_args, args)
    if run_folder.is_finished(args):
        print(f"{args.output_dir} is finished: nothing to do (a longer budget continues it)")
        return 0
    stop = StopSignals()
    sharding = parallel.launched_sharding(args.pipeline_config)
    accelerator = parallel.make_accelerator(args.precision, args.report_to, args.pipeline_config)  # by the YAML
    say = partial(print, flush=True) if accelerator.is_main_process else lambda *_, **__: None
    refuse_fused_loss(args.use_liger_kernel, accelerator.device.type)
    in_force = parallel.describe(accelerator)
    say("strategy: {strategy}, {world_size} process(es), {precision}, {device}".format(**in_force))
    output_dir = Path(parallel.on_main(accelerator, lambda: args.output_dir or run_folder.make_run_folder()))
    agree_max = parallel.agree_max(accelerator)
    rank, ranks = parallel.data_rank(accelerator)
    here = {"rank": rank, "ranks": ranks, "device": accelerator.device}

    # ---- Data, memory, model, optimizer ----------------------------------------------------------
    tokenizer, rows, eval_rows, corpus = parallel.main_first(
        accelerator, partial(prepare_rows, config, data_args, say)
    )
    fit_vocabulary(config, tokenizer, model_args, data_args)
    per_device, accumulation = args.batch_ramp.cut(args.per_device_train_batch_size, ranks)
    shape = (config, data_args, args, per_device, accumulation)
    workload = make_workload(*shape, in_force["precision"], ranks, accelerator.device.type, sharding)
    footprint = parallel.on_main(accelerator, workload.footprint)
    expected = parallel.on_main(accelerator, lambda: estimate(workload, resident_bytes()))
    say(format_estimate(expected, args.mem_cap))
    if not footprint.traced:
        say(f"note: a {config.model_type} cannot be traced; its activations are a general figure")
    parallel.on_main(accelerator, lambda: refuse(workload, expected, model_args, args))
    cap = set_memory_cap(args.mem_cap, accelerator.device) if args.mem_cap else None
    if args.mem_cap:
        parallel.limit_memory(accelerator, args.mem_cap)
    set_seed(args.seed)
    model = build_causal_lm(model_args, data_args, config, parallel.loader(accelerator), parallel.builder(accelerator))
    set_attention(model, workload.attention)
    if args.gradient_checkpointing:
        recompute_layers(model)
    parameters, flops = model.num_parameters(), causal_flops(model, data_args.block_size)
    compiling = parallel.compiles(accelerator, args.torch_compile)
    if compiling:  # before it is wrapped, so that what a strategy does around it stays outside
        model.compile(fullgraph=True, dynamic=False)
    find = partial(find_fused_loss, accelerator, config.vocab_size, compiling, args.use_liger_kernel, say)
    use_fused_loss(parallel.on_main(accelerator, find))
    optimizer = build_optimizer(model, args, in_force["precision"])
    parallel.set_batch(accelerator, per_device, accumulation, args.max_grad_norm)
    model, optimizer = accelerator.prepare(model.train(), optimizer)

    # ---- The global batch, cut into what fits a device -------------------------------------------
    objective = NextToken()
    eval_batches = EvalBatches(
        eval_rows, objective, data_args.max_eval_samples, args.per_device_eval_batch_size, **here
    )
    stream = partial(TrainBatches, rows, objective, args.seed, **here)
    if args.auto_find_batch_size:
        first_batch = lambda size: next(stream(batch_size=size, accumulation=1).micro_batches())[0]  # noqa: E731
        try_batch = lambda size: to_device(first_batch(size), accelerator.device)  # noqa: E731
        per_device = find_batch_size(accelerator, model, try_batch, per_device, agree_max)
        per_device, accumulation = args.batch_ramp.cut(per_device, ranks)
        parallel.set_batch(accelerator, per_device, accumulation, args.max_grad_norm)
    say(
        f"output: {output_dir}",
        f"model: {name_of(model_args)}, {parameters:,} parameters; {len(rows):,} rows of {data_args.block_size} "
        f"tokens; global batch {args.train_batch_size} rows = {per_device} per device x {accumulation} accumulation x "
        f"{ranks} process(es)",
        sep="\n",
    )

    # ---- Everything a resumed run must remember --------------------------------------------------
    settings = resume_settings(model_args, data_args, args)
    settings |= {"corpus": corpus.fingerprint if corpus else "synthetic", "precision": in_force["precision"]}
    settings |= {
        f"model {name}": str(value) for name, value in sorted(config.to_diff_dict().items()) if name not in UNSAID
    }
    run = Run(accelerator, model, optimizer, args, len(rows), settings, output_dir, say, stop)
    command = os.environ.get("FRUGAL_COMMAND") or shlex.join(["python", *sys.argv])  # as the user typed it
    facts = {"model": vars(model_args), "data": vars(data_args), "training": vars(args), "command": command} | in_force
    parallel.on_main(accelerator, lambda: run_folder.write_arguments(output_dir, facts))
    if tokenizer:  # for its checkpoints
        parallel.on_main(accelerator, lambda: tokenizer.save_pretrained(output_dir) and None)
    span = {"consumed_rows": run.state.consumed_rows, "ramp": run.limits.ramp}
    batches = stream(batch_size=per_device, accumulation=accumulation, **span)
    parallel.start_tracker(accelerator, output_dir, args.project_name, args.job_name or output_dir.name, settings)

    # ---- Train until the budget is spent -----------------------------------------------------------
    meter = Meter(flops, CAUSAL_FORMULA, batches, accelerator.device, in_force["precision"], in_force["world_size"])
    grad_norm = None
    for batch, number, tokens in run.steps(batches, eval_batches, tokenizer, meter, "training", compiling, cap):
        with accelerator.accumulate(model):
            parallel.seed_dropout(args.seed, run.state.completed_steps, number)
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients and args.max_grad_norm > 0:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        run.log.add(loss)
        if accelerator.sync_gradients:
            run.finish_step(grad_norm, tokens, skipped=optimizer.step_was_skipped)

    # ---- Save, judge, report -----------------------------------------------------------------------
    if args.throughput_steps and run.reason != "signal":
        return run.report_throughput(in_force | {"estimated_memory_bytes": expected.total})
    if (exit_code := run.stopped()) is not None:
        return exit_code
    results = run.results() | in_force | {"estimated_memory_bytes": expected.total}
    if accelerator.is_main_process and corpus:
        results |= unigram_baseline(corpus.train, config.vocab_size, eval_batches)
        examples = continuations(output_dir, tokenizer, corpus.validation)
        report(CAUSAL, output_dir, results, corpus, examples, config, command, meter)
    elif accelerator.is_main_process:
        write_all_results(output_dir / run_folder.RESULTS, results)
        say(f"held-out loss {results['eval_loss']:.4f}; model: {output_dir}")
    parallel.shut_down(accelerator)
    return 0


def prepare_rows(config, data_args, say, first=True):
    """The rows for training and validation, with the tokenizer and the corpus behind them, None for random tokens.

    Only the first process overwrites a cache; the others use what it made.
    """
    length = data_args.block_size
    if data_args.synthetic_data:
        sizes = enumerate((TRAIN_ROWS, EVAL_ROWS))
        return None, *(SyntheticRows(config.vocab_size, length, number, seed) for seed, number in sizes), None
    data_args = replace(data_args, overwrite_cache=data_args.overwrite_cache and first)
    corpus = prepare_corpus(data_args, say, CAUSAL_TOKENIZER)
    frame = Frame.for_causal(corpus.tokenizer)
    rows = (
        build_rows(part, frame, length, data_args.packing, corpus.rows_folder / name, flag="--block_size")
        for name, part in (("train", corpus.train), ("validation", corpus.validation))
    )
    return corpus.tokenizer, *rows, corpus


def make_workload(config, data_args, args, rows, accumulation, precision, ranks, device, sharding):
    """What common.memory needs to know of a process's work."""
    return Workload(
        config,
        rows,
        data_args.block_size,
        precision=precision,
        optimizer_type=args.optimizer_type,
        state=None if args.optimizer_type in OPTIMIZERS and not args.optimizer_args else optimizer_state(config, args),
        ranks=ranks,
        accumulation=accumulation,
        gradient_checkpointing=args.gradient_checkpointing,
        packed=data_args.packing == "documents",
        attention=attention_path(config, data_args.block_size, precision, device),
        device=device,
        **sharding,
    )


def check(config, model_args, data_args, args):
    """--check_arguments: everything that can fail before training does so here; the text is prepared."""
    launch = parallel.check_launch(args.precision, args.report_to, args.torch_compile, args.pipeline_config)
    device = "cpu" if launch.cpu else "cuda"
    refuse_fused_loss(args.use_liger_kernel, device)
    model = build_causal_lm(model_args, data_args, config, parallel.load_shapes, build_without_numbers)
    parallel.check_cut(model, launch)
    parallel.check_optimizer(launch.engine, build_optimizer(model, args, launch.precision))
    workload = expected_workload(config, data_args, args, launch.precision, device)
    least = args.batch_ramp.least_accumulation(workload.rows, workload.ranks)
    parallel.check_micro_batches(launch.pipe, workload.rows, least)
    if args.replay_clock:
        read_readings(args.replay_clock)
    if args.resume_from_checkpoint:
        resolve_checkpoint(args.resume_from_checkpoint, args.output_dir)
    tokenizer, *_ = prepare_rows(config, data_args, print)
    fit_vocabulary(config, tokenizer, model_args, data_args)
    refuse(workload, estimate(workload, resident_bytes()), model_args, args)
    return 0


def refuse(workload, expected, model_args, args):
    """Refuse what needs more memory than it may have or than there is."""
    pretrained = bool(model_args.model_name_or_path)
    refuse_above_cap(workload, expected, args.mem_cap, pretrained)
    refuse_above_memory(workload, expected, parallel.launched_machines(), pretrained)


def plan(config, model_args, data_args, args):
    """--dry_run: what the run would be on GPUs, from the shapes alone."""
    if os.environ.get("RANK", "0") == "0":
        precision = args.precision or "bf16"  # as the YAMLs have it
        rows = planned(expected_workload(config, data_args, args, precision, "cuda"), every=True)
        print(format_plan(rows, name_of(model_args)))
    return 0


def expected_workload(config, data_args, args, precision, device):
    """As make_workload, before an accelerator says what is in force; precision: as --precision or "no"."""
    ranks = parallel.launched_data_ranks(args.pipeline_config)
    per_device, accumulation = args.batch_ramp.cut(args.per_device_train_batch_size, ranks)
    precision = {"no": "fp32"}.get(precision, precision)
    sharding = parallel.launched_sharding(args.pipeline_config)
    return make_workload(config, data_args, args, per_device, accumulation, precision, ranks, device, sharding)


def name_of(model_args):
    """What people call the model."""
    given = model_args.model_name_or_path or model_args.config_name
    return given or "-".join(filter(None, (model_args.model_type, model_args.model_size)))


if __name__ == "__main__":
    run_main(main)
