"""Pretrain a BERT-family model on masked-language modelling under a wall-clock budget.

    bash scripts/run_pretraining.sh                                  # 5 minutes on whatever is there
    python run_pretraining.py --total_training_time 1 --train_file corpus.txt
    accelerate launch --config_file accelerate_configs/ddp.yaml run_pretraining.py --max_train_steps 1000

Every flag: python run_pretraining.py --help. Parallelism comes from the YAML alone.
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
from common.arguments import parse_pretraining_arguments
from common.batch_size import find_batch_size
from common.checkpoint import resolve_checkpoint
from common.clock import read_readings
from common.data.batches import EvalBatches, Masking, TrainBatches, to_device
from common.data.packing import Frame, build_rows
from common.data.prepare import prepare_corpus
from common.data.sentence_pairs import SentencePairs
from common.errors import run_main
from common.fill_mask import fill_mask_examples
from common.final_report import report
from common.models.attention_choice import choose_attention, refuse_attention
from common.models.families import judges_tokens
from common.models.layers import use_attention
from common.models.liger import find_fused_loss, refuse_fused_loss, use_fused_loss
from common.models.mlm import build_mlm_model
from common.models.recompute import recompute_layers
from common.optimizers import build_optimizer
from common.parallel.state import plain_model
from common.report import ELECTRA, MASKED
from common.resume import resume_settings
from common.run import Run
from common.stop import StopSignals
from common.unigram import start_from_frequencies, unigram_baseline
from common.utilisation import MASKED_FORMULA, Meter, masked_flops


def main():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model_args, data_args, args, notes = parse_pretraining_arguments()
    run_folder.follow_restart(args)
    run_folder.check_run_folder(args)
    parallel.check_flags(args.torch_compile, args.auto_find_batch_size, args.ema_decay)
    if args.check_arguments:
        return check(model_args, data_args, args)
    if run_folder.is_finished(args):
        print(f"{args.output_dir} is finished: nothing to do (a longer budget continues it)")
        return 0
    stop = StopSignals()
    accelerator = parallel.make_accelerator(args.precision, args.report_to, args.pipeline_config)  # by the YAML
    say = partial(print, flush=True) if accelerator.is_main_process else lambda *_, **__: None
    refuse_attention(model_args.attn_implementation, accelerator.device.type)
    refuse_fused_loss(args.use_liger_kernel, accelerator.device.type)
    in_force = parallel.describe(accelerator)
    say(*notes, "strategy: {strategy}, {world_size} process(es), {precision}, {device}".format(**in_force), sep="\n")
    output_dir = Path(parallel.on_main(accelerator, lambda: args.output_dir or run_folder.make_run_folder()))
    agree_max = parallel.agree_max(accelerator)
    rank, ranks = parallel.data_rank(accelerator)
    here = {"rank": rank, "ranks": ranks, "device": accelerator.device}

    # ---- Data, model, optimizer ------------------------------------------------------------------
    corpus, shorter, rows, eval_rows = parallel.main_first(accelerator, partial(prepare_rows, data_args, say))
    flags = ("mlm_probability", "final_mlm_probability", "masking", "mask_replace_prob", "random_replace_prob")
    set_seed(args.seed)
    begin = None
    if model_args.init_output_bias == "unigram":
        begin = partial(start_from_frequencies, token_file=corpus.train)
    how = {"load": parallel.loader(accelerator), "build": parallel.builder(accelerator), "begin": begin}
    model = build_mlm_model(model_args, data_args, corpus.tokenizer, **how)
    chosen = {name: getattr(data_args, name) for name in flags} | {"judges_tokens": judges_tokens(model.config)}
    masking = Masking.for_tokenizer(corpus.tokenizer, **chosen)
    eval_batches = EvalBatches(eval_rows, masking, data_args.max_eval_samples, args.per_device_eval_batch_size, **here)
    if args.gradient_checkpointing:
        recompute_layers(model)
    config, parameters = model.config, model.num_parameters()
    compiling = parallel.compiles(accelerator, args.torch_compile)
    if compiling:  # before it is wrapped, so that what a strategy does around it stays outside
        model.compile(fullgraph=True, dynamic=False)
    find = partial(find_fused_loss, accelerator, config.vocab_size, compiling, args.use_liger_kernel, say)
    use_fused_loss(parallel.on_main(accelerator, find))
    optimizer = build_optimizer(model, args, in_force["precision"])

    # ---- The global batch, cut into what fits a device -------------------------------------------
    per_device, accumulation = args.batch_ramp.cut(args.per_device_train_batch_size, ranks)
    parallel.set_batch(accelerator, per_device, accumulation, args.max_grad_norm)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    stream = partial(TrainBatches, rows, masking, args.seed, **here)
    attention = model_args.attn_implementation
    if args.auto_find_batch_size:
        use_attention(plain_model(model), "plain" if attention == "auto" else attention)  # plain needs the most memory
        first_batch = lambda size: next(stream(batch_size=size, accumulation=1).micro_batches())[0]  # noqa: E731
        try_batch = lambda size: to_device(first_batch(size), accelerator.device)  # noqa: E731
        per_device = find_batch_size(accelerator, model, try_batch, per_device, agree_max)
        per_device, accumulation = args.batch_ramp.cut(per_device, ranks)
        parallel.set_batch(accelerator, per_device, accumulation, args.max_grad_norm)
    say(f"output: {output_dir}")
    say(
        f"model: {model_args.model_name_or_path or config.model_type}, {parameters:,} parameters; "
        f"{len(rows):,} rows of {data_args.max_seq_length} tokens; global batch {args.train_batch_size} rows = "
        f"{per_device} per device x {accumulation} accumulation x {ranks} process(es)"
    )

    for end, short in shorter:
        times = data_args.max_seq_length // short.seq_length
        say(f"up to {end:.1%} of the run: {len(short):,} rows of {short.seq_length} tokens, {times} for one")

    # ---- Everything a resumed run must remember --------------------------------------------------
    settings = resume_settings(model_args, data_args, args)
    settings |= {"corpus": corpus.fingerprint, "precision": in_force["precision"], **shape_of(config)}
    run = Run(accelerator, model, optimizer, args, len(rows), settings, output_dir, say, stop, args.ema_decay)

    def shape_with(length):
        pairs = data_args.sentence_objective != "none"  # one more position that the last layer computes
        targets = {mode.most_targets(length) + pairs for mode in (masking, masking.for_validation())}
        in_batch = per_device * (data_args.max_seq_length // length)
        return config, in_batch, length, sorted(targets), data_args.packing == "documents", compiling

    *others, shape = (shape_with(stage.length) for stage in data_args.stages)
    choose = partial(choose_attention, accelerator, shape, attention, run.saved.get("attention"), say, others)
    attention = parallel.on_main(accelerator, choose)
    use_attention(plain_model(model), attention)
    run.remembered = {"attention": attention}
    command = os.environ.get("FRUGAL_COMMAND") or shlex.join(["python", *sys.argv])  # as the user typed it
    facts = {"model": vars(model_args), "data": vars(data_args), "training": vars(args), "command": command} | in_force
    parallel.on_main(accelerator, lambda: run_folder.write_arguments(output_dir, facts))
    parallel.on_main(accelerator, lambda: corpus.tokenizer.save_pretrained(output_dir) and None)  # for its checkpoints
    span = {"consumed_rows": run.state.consumed_rows, "total_rows": run.limits.total_rows, "ramp": run.limits.ramp}
    batches = stream(batch_size=per_device, accumulation=accumulation, shorter=shorter, **span)
    parallel.start_tracker(accelerator, output_dir, args.project_name, args.job_name or output_dir.name, settings)

    def flops(rows, tokens, layer_passes=3):
        length = batches.rows.seq_length  # in the present stage
        targets = rows * batches.times * masking.most_targets(length)
        return masked_flops(config, tokens, targets, length, layer_passes)

    # ---- Train until the budget is spent -----------------------------------------------------------
    meter = Meter(flops, MASKED_FORMULA, batches, accelerator.device, in_force["precision"], in_force["world_size"])
    grad_norm = None
    for batch, number, tokens in run.steps(batches, eval_batches, corpus.tokenizer, meter, "pretraining", compiling):
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
        return run.report_throughput(in_force)
    if (exit_code := run.stopped()) is not None:
        return exit_code
    results = run.results() | in_force
    if accelerator.is_main_process:
        results |= unigram_baseline(corpus.train, masking.vocab_size, eval_batches)
        kind = ELECTRA if judges_tokens(config) else MASKED
        examples = fill_mask_examples(output_dir / kind.folder, corpus.tokenizer, corpus.validation)
        report(kind, output_dir, results, corpus, examples, config, command, meter)
    parallel.shut_down(accelerator)
    return 0


def check(model_args, data_args, args):
    """--check_arguments: everything that can fail before training does so here; the text is prepared."""
    launch = parallel.check_launch(args.precision, args.report_to, args.torch_compile, args.pipeline_config)
    refuse_attention(model_args.attn_implementation, "cpu" if launch.cpu else "cuda")
    refuse_fused_loss(args.use_liger_kernel, "cpu" if launch.cpu else "cuda")
    ranks = parallel.launched_data_ranks(args.pipeline_config)
    per_device, _ = args.batch_ramp.cut(args.per_device_train_batch_size, ranks)
    parallel.check_micro_batches(launch.pipe, per_device, args.batch_ramp.least_accumulation(per_device, ranks))
    if args.replay_clock:
        read_readings(args.replay_clock)
    if args.resume_from_checkpoint:
        resolve_checkpoint(args.resume_from_checkpoint, args.output_dir)
    corpus, *_ = prepare_rows(data_args, print)
    model = build_mlm_model(model_args, data_args, corpus.tokenizer)
    parallel.check_cut(model, launch)
    parallel.check_optimizer(launch.engine, build_optimizer(model, args, launch.precision))
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
    """The corpus that the flags name, the shorter rows of earlier stages, and the rows for training and validation.

    Only the first process overwrites a cache; the others use what it made.
    """
    corpus = prepare_corpus(replace(data_args, overwrite_cache=data_args.overwrite_cache and first), say)
    frame = Frame.for_masked(corpus.tokenizer)

    def rows_of(name, length):
        part = getattr(corpus, name)
        if data_args.sentence_objective != "none":
            return SentencePairs(part, frame, length, data_args.sentence_objective)
        return build_rows(part, frame, length, data_args.packing, corpus.rows_folder / name)

    *shorter, longest = data_args.stages
    shorter = [(float(stage.end), rows_of("train", stage.length)) for stage in shorter]
    return corpus, shorter, rows_of("train", longest.length), rows_of("validation", longest.length)


if __name__ == "__main__":
    run_main(main)
