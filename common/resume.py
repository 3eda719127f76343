"""Which settings of a run a continued run must share with its checkpoint, and which it may change."""

from dataclasses import MISSING, fields

# What a continued run may change, because it only cuts, watches or ends the run differently ...
FREE_ON_RESUME = """
    output_dir overwrite_output_dir check_arguments total_training_time early_exit_time_marker max_train_steps
    num_train_epochs finetune_time_markers per_device_train_batch_size per_device_eval_batch_size
    auto_find_batch_size throughput_steps gradient_checkpointing torch_compile use_liger_kernel memory_settings
    eval_steps do_validation shards_per_epoch validation_epochs validation_epochs_begin validation_epochs_end
    validation_begin_proportion validation_end_proportion use_early_stopping early_stop_time early_stop_eval_loss
    resume_from_checkpoint checkpointing_steps checkpointing_minutes num_epochs_between_checkpoints
    save_total_limit replay_clock logging_steps report_to project_name job_name bf16 fp16 fp32 cache_dir
    overwrite_cache preprocessing_num_workers max_eval_samples parity gradient_accumulation_steps mem_cap dry_run
    max_bad_records trust_remote_code streaming attn_implementation model_name_or_path pipeline_config
""".split()
# ... or because the fingerprint of the prepared text and tokenizer speaks for it.
IN_THE_FINGERPRINT = """
    dataset_name dataset_config_name train_file validation_file dataset_path tokenizer_name text_column
    document_separator validation_split_percentage max_train_documents tokenizer_train_vocab_size
""".split()
# Changed on purpose, as after a loss that became NaN; a continued run says so.
SAID_ON_RESUME = """
    learning_rate max_grad_norm lr_schedule lr_scheduler_type warmup_proportion num_warmup_steps min_lr_ratio lr_power
    decay_proportion exponential_end_ratio decay_rate decay_step curve_conf_file esd_shrink esd_cr_k
""".split()


class Settings(dict):
    """Settings by name. Attribute before: what those were in force as whose flags did not exist yet, by name."""

    before = {}


def resume_settings(*groups):
    """The settings that decide what a run computes, as a flat dict of plain values, for its checkpoints.

    Args:
        groups: the dataclasses that parse_pretraining_arguments returns.
    Returns:
        Settings.
    """
    left_out = {*FREE_ON_RESUME, *IN_THE_FINGERPRINT}
    flags = [(group, flag) for group in groups for flag in fields(group) if flag.name not in left_out]
    settings = Settings({flag.name: getattr(group, flag.name) for group, flag in flags})
    settings.before = {flag.name: _default(flag) for _, flag in flags}
    return settings


def saved_settings(saved, settings):
    """What a checkpoint's run was set to; it may be older than some of today's flags.

    Args:
        saved: dict, the settings in the checkpoint; settings: today's Settings, or a plain dict of them.
    """
    return getattr(settings, "before", {}) | saved


def _default(flag):
    return flag.default if flag.default_factory is MISSING else flag.default_factory()
