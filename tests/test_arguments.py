"""The command line: ExtremeBERT's best recipe means what it says, contradictions are refused, the flags are frozen."""

import json
import shlex
from pathlib import Path

import pytest

from common.arguments import frozen_flags, parse_pretraining_arguments
from common.errors import UserError
from pretraining import BERT_CONFIG, EXTREMEBERT

FLAGS = Path(__file__).parent / "frozen_flags.txt"


def parse(text):
    return parse_pretraining_arguments(shlex.split(text))


def test_extremeberts_best_recipe_means_what_it_says():
    words = EXTREMEBERT.format(tokenizer="bert-large-uncased", dataset="data", output="training-out") + " --fp16"
    model, data, training, notes = parse(words)
    assert model.model_type == "bert" and model.encoder_ln_mode == "pre-ln" and model.hidden_dropout_prob == 0.1
    assert model.shape == {
        "num_hidden_layers": 24,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }
    assert data.dataset_path == "data" and data.tokenizer_name == "bert-large-uncased"
    expected = {
        "learning_rate": 1e-3,
        "train_batch_size": 4096,
        "per_device_train_batch_size": 32,
        "lr_schedule": "time",
        "lr_scheduler_type": "linear",
        "warmup_proportion": 0.06,
        "max_grad_norm": 0.0,
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-6,
        "total_training_time": 24.0,
        "early_exit_time_marker": 24.0,
        "logging_steps": 100,
        "num_epochs_between_checkpoints": 10000,
        "validation_epochs": 3,
        "validation_begin_proportion": 0.05,
        "validation_end_proportion": 0.01,
        "per_device_eval_batch_size": 16,
        "do_validation": True,
        "use_early_stopping": True,
        "early_stop_time": 180.0,
        "early_stop_eval_loss": 6.0,
        "precision": "fp16",
        "job_name": "pretraining_experiment",
    }
    assert {name: getattr(training, name) for name in expected} == expected
    assert [note.split()[1] for note in notes] == ["--deepspeed", "--data_loader_type"]
    assert all(".yaml" in note for note in notes)


@pytest.mark.parametrize("words", ["--local_rank 0", "--local_rank=0", "--deepspeed --local_rank -1"])
def test_a_launchers_flags_are_noted_and_dropped(words):
    *_, training, notes = parse(words + " --max_steps 7")
    assert training.max_train_steps == 7 and len(notes) == len([w for w in words.split() if w.startswith("--")])


def test_pipedreams_names_are_aliases(bert_config):
    words = "--num_minibatches 200 --train_path a.txt --vocab_path vocab.txt --checkpoint_dir out --learning_rate 2e-5"
    model, data, training, _ = parse(f"{words} --bert_config_path {bert_config()}")
    assert (data.train_file, data.tokenizer_name) == ("a.txt", "vocab.txt")
    assert (training.max_train_steps, training.output_dir, training.learning_rate) == (200, "out", 2e-5)
    assert model.config_name == str(bert_config())


@pytest.fixture
def bert_config(tmp_path):
    """Returns: function of changes that writes the configuration with them, and returns its path."""

    def write(**changes):
        (tmp_path / "bert_config.json").write_text(json.dumps(BERT_CONFIG | changes))
        return tmp_path / "bert_config.json"

    return write


def test_a_configuration_is_a_shape_over_which_flags_win(bert_config, tmp_path):
    model = parse(f"--config_name {bert_config()} --num_hidden_layers 12 --hidden_dropout_prob 0")[0]
    wide = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
    assert model.shape == wide | {"num_hidden_layers": 12}
    assert (model.hidden_dropout_prob, model.attention_probs_dropout_prob) == (0.0, 0.1)
    assert (model.vocab_size, model.max_position_embeddings, model.hidden_act) == (30522, 512, "gelu")
    bert_config(model_type="bert", hidden_size=128, num_attention_heads=2).rename(tmp_path / "config.json")
    for named in (tmp_path / "config.json", tmp_path):  # a folder, by transformers
        model = parse(f"--config_name {named} --encoder_ln_mode pre-ln")[0]
        assert model.shape["hidden_size"] == 128 and model.family == "megatron-bert"


@pytest.mark.parametrize(
    ("changes", "words", "expected"),
    [
        ({}, "--model_size base", "--config_name contradicts --model_size"),
        ({}, "--model_name_or_path x", "--config_name contradicts --model_name_or_path"),
        ({}, "--model_type roberta", "--model_type roberta contradicts --config_name"),
        ({"model_type": "roberta"}, "", "is no BERT's"),
        ({"type_vocab_size": 16}, "", "type_vocab_size 16 is not trained: set it to 2"),
        ({"layer_norm_eps": 1e-5}, "", "layer_norm_eps 1e-05 is not trained"),
    ],
)
def test_a_configuration_that_cannot_be_trained(bert_config, changes, words, expected):
    with pytest.raises(UserError, match=expected):
        parse(f"--config_name {bert_config(**changes)} {words}")


def test_a_configuration_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=f"--config_name {tmp_path}/no.json cannot be read"):
        parse(f"--config_name {tmp_path}/no.json")


def test_parity_restores_the_examples_defaults_and_explicit_flags_win():
    model, data, training, _ = parse("--parity hf --adam_beta2 0.95 --hidden_dropout_prob 0")
    assert (model.hidden_dropout_prob, model.attention_probs_dropout_prob) == (0.0, 0.1)
    assert (model.init_output_bias, data.packing, data.mlm_probability) == ("zeros", "concat", 0.15)
    expected = {
        "optimizer_type": "adamw",
        "learning_rate": 5e-5,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 0.0,
        "lr_schedule": "step",
        "lr_scheduler_type": "linear",
        "warmup_proportion": 0.0,
        "train_batch_size": 8,
        "num_train_epochs": 3.0,
        "total_training_time": None,
    }
    assert {name: getattr(training, name) for name in expected} == expected
    assert parse("--max_steps 7 --parity=hf")[2].num_train_epochs is None
    assert parse("--parity hf --model_name_or_path x")[0].init_output_bias == "zeros"


def test_the_budget_settles_the_schedule():
    assert parse("")[2].total_training_time == pytest.approx(5 / 60)
    assert parse("")[2].lr_schedule == "time"
    assert parse("--max_train_steps 5")[2].lr_schedule == "step"
    assert parse("--num_train_epochs 2")[2].total_training_time is None
    both = parse("--max_train_steps 5 --total_training_time 1")[2]
    assert (both.lr_schedule, both.max_train_steps, both.total_training_time) == ("time", 5, 1.0)
    assert parse("--early_exit_time_marker 2")[2].total_training_time == 2
    assert parse("--lr_schedule constant_step --num_warmup_steps 3 --max_steps 9")[2].lr_schedule == "step"


def test_model_type_and_layer_norm_mode_agree():
    assert parse("--model_type megatron-bert")[0].encoder_ln_mode == "pre-ln"
    assert parse("")[0].encoder_ln_mode == "post-ln"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--hidden_size 100 --num_attention_heads 3", ["--hidden_size 100", "--num_attention_heads 3"]),
        ("--hiden_size 100", ["--hiden_size", "--hidden_size"]),
        ("--max_seq_length 600 --max_position_embeddings 512", ["--max_seq_length 600", "--max_position_embeddings"]),
        ("--model_size giant", ["--model_size giant", "mini"]),
        ("--parity keras", ["--parity keras", "hf"]),
        ("--parity", ["--parity"]),
        ("--model_type gpt", ["--model_type gpt", "bert"]),
        ("--model_type megatron-bert --encoder_ln_mode post-ln", ["megatron-bert", "--encoder_ln_mode"]),
        ("--model_name_or_path x --hidden_size 64", ["--hidden_size", "--model_name_or_path"]),
        ("--train_file a.txt --dataset_name b", ["--train_file", "--dataset_name"]),
        ("--dataset_path a --train_file b", ["--dataset_path", "--train_file"]),
        ("--validation_file a.txt", ["--validation_file", "--train_file"]),
        ("--dataset_config_name a", ["--dataset_config_name", "--dataset_name"]),
        ("--mlm_probability 0", ["--mlm_probability"]),
        ("--mlm_probability 1", ["--mlm_probability"]),
        ("--final_mlm_probability 0 --max_steps 5", ["--final_mlm_probability"]),
        ("--final_mlm_probability 0.15 --total_training_time 1", ["--final_mlm_probability", "--lr_schedule step"]),
        ("--max_seq_length 3", ["--max_seq_length"]),
        ("--max_seq_length_stages 128:0.9,512", ["--max_seq_length_stages 128:0.9,512", "128:0.9,512:0.1"]),
        ("--max_seq_length_stages=", ["--max_seq_length_stages", "empty"]),
        ("--max_seq_length_stages 128:0.9,512:0.1 --max_seq_length 256", ["--max_seq_length 256", "_stages"]),
        ("--max_seq_length_stages 128:0.9,512:0.1 --max_steps 5", ["--max_train_steps 5", "512 tokens"]),
        ("--max_seq_length_stages 128:0.9,512:0.1 --throughput_steps 50", ["--throughput_steps", "_stages"]),
        ("--max_seq_length_stages 128:0.9,1024:0.1 --max_position_embeddings 512", ["--max_seq_length 1024", "512"]),
        ("--sentence_objective order --dataset_path a", ["--sentence_objective order", "sop"]),
        ("--sentence_objective sop --train_file a", ["--split_sentences", "--dataset_path"]),
        ("--sentence_objective nsp --dataset_path a --packing concat", ["--sentence_objective", "--packing concat"]),
        ("--train_batch_size 0", ["--train_batch_size 0"]),
        ("--rampup_batch_size 4 4", ["--rampup_batch_size 4 4", "START INCREMENT ROWS"]),
        ("--train_batch_size 16 --rampup_batch_size 4 5 60", ["--rampup_batch_size 4 5 60", "--train_batch_size 16"]),
        ("--rampup_batch_size 4 x 60", ["--rampup_batch_size", "x"]),
        ("--total_training_time 0", ["--total_training_time"]),
        ("--total_training_time nan", ["--total_training_time"]),
        ("--learning_rate -1", ["--learning_rate"]),
        ("--learning_rate fast", ["--learning_rate", "fast"]),
        ("--bf16 --fp32", ["--bf16", "--fp32"]),
        ("--fp16 --bf16", ["--fp16", "--bf16"]),
        ("--overwrite_output_dir --resume_from_checkpoint latest --output_dir x", ["--overwrite_output_dir"]),
        ("--resume_from_checkpoint latest", ["--resume_from_checkpoint latest", "--output_dir"]),
        ("--lr_schedule step", ["--lr_schedule step", "--max_train_steps"]),
        ("--lr_schedule time --max_steps 5", ["--lr_schedule time", "--total_training_time"]),
        ("--lr_schedule constant_step --max_steps 5", ["constant_step", "--num_warmup_steps"]),
        ("--lr_schedule weekly", ["--lr_schedule weekly", "time"]),
        ("--num_warmup_steps 5", ["--num_warmup_steps", "--warmup_proportion"]),
        ("--curve zigzag", ["zigzag", "linear"]),
        ("--lr_power 2", ["--lr_power", "linear"]),
        ("--finetune_time_markers 0.5,x", ["--finetune_time_markers", "0.25,0.5"]),
        ("--finetune_time_markers 1.5", ["--finetune_time_markers"]),
        ("--finetune_time_markers 0.5 --max_steps 3", ["--finetune_time_markers", "--total_training_time"]),
        ("--warmup_proportion 2", ["--warmup_proportion"]),
        ("--report_to nowhere", ["--report_to", "tensorboard"]),
        ("--hidden_dropout_prob 1", ["--hidden_dropout_prob"]),
        ("--validation_split_percentage 0", ["--validation_split_percentage"]),
        ("--packing boxes", ["--packing", "documents"]),
        ("--max_bad_records -1", ["--max_bad_records"]),
        ("--save_total_limit 0", ["--save_total_limit"]),
        ("--logging_steps 0", ["--logging_steps"]),
        ("--curve polynomial --lr_power -1", ["--lr_power"]),
        ("--curve wsd --decay_proportion 0", ["--decay_proportion"]),
        ("--curve esd --esd_shrink 1", ["--esd_shrink"]),
        ("--curve exp --exponential_end_ratio -1", ["--exponential_end_ratio"]),
        ("--seed -1", ["--seed"]),
        ("--ema_decay 1", ["--ema_decay 1"]),
        ("--seed 4294967296", ["--seed"]),
        ("--initializer_range -1", ["--initializer_range"]),
        ("--adam_beta2 1", ["--adam_beta2"]),
        ("--model_name_or_path x --hidden_act relu", ["--hidden_act", "--model_name_or_path"]),
        ("--model_name_or_path x --encoder_ln_mode pre-ln", ["--encoder_ln_mode", "--model_name_or_path"]),
        ("--use_early_stopping", ["--use_early_stopping", "--eval_steps"]),
        ("--streaming", ["--streaming", "--dataset_name"]),
        ("--train_file=", ["--train_file", "empty"]),
        ("--hidden_size 200", ["--hidden_size 200", "--num_attention_heads"]),
    ],
)
def test_contradictions_are_refused_by_name(words, named):
    with pytest.raises(UserError) as refusal:
        parse(words)
    message = str(refusal.value)
    assert "\n" not in message and all(name in message for name in named), message


def test_flags_are_frozen():
    assert frozen_flags() == FLAGS.read_text().split(), "a flag came or went: update tests/frozen_flags.txt and README"
