"""Objectives beside plain masking, in whole runs: they learn, and a continued run equals the uninterrupted one."""

import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForPreTraining, AutoTokenizer
from transformers.utils import logging

from common.arguments import DataArguments, ModelArguments
from common.data.batches import Masking, to_device
from common.data.masking import derive_key
from common.data.packing import Frame
from common.data.sentence_pairs import SentencePairs
from common.data.token_files import TokenFile
from common.models.mlm import build_mlm_model
from pretraining import SCRIPT, SMALL, assert_same_run, fp32_copy, losses, results, small_run, weights

logging.set_verbosity_error()


@pytest.fixture(scope="module")
def sentences(harness, tiny_corpus, tmp_path_factory):
    """Token files of the tiny corpus, one sequence for each sentence."""
    folder = tmp_path_factory.mktemp("sentences") / "prepared"
    flags = ["--split_sentences", "--validation_split_percentage", 10, "--tokenizer_train_vocab_size", 600]
    harness.run("prepare_pile_data.py", "--input", tiny_corpus, "--output_dir", folder, *flags).check()
    return folder


def pairs_run(sentences, cache, out, *flags, steps):
    data = ["--dataset_path", sentences, "--cache_dir", cache, "--max_train_steps", steps, "--train_batch_size", 16]
    return [SCRIPT, *SMALL, *data, "--output_dir", out, *flags]


def assert_continues(harness, words_for, whole, continued, step):
    """Go back to a checkpoint in a copy of a finished run's folder, and make the same again."""
    shutil.copytree(whole, continued)
    resume = ["--resume_from_checkpoint", continued / f"step_{step}"]
    assert "continuing from" in harness.run(*words_for(continued), *resume).check().stdout
    assert_same_run(whole, continued)


def test_a_masking_rate_that_falls_is_learned_from_and_continued(harness, tiny_corpus, cache, tmp_path):
    flags = ["--mlm_probability", 0.3, "--final_mlm_probability", 0.15, "--masking", "ngram", "--learning_rate", 5e-3]
    flags += ["--checkpointing_steps", 6, "--init_output_bias", "zeros", "--save_total_limit", 9]
    words_for = lambda out: small_run(tiny_corpus, cache, out, *flags, steps=20)  # noqa: E731
    harness.run(*words_for(tmp_path / "whole")).check()
    course = list(losses(tmp_path / "whole").values())
    assert sum(course[-5:]) < sum(course[:5]) - 1
    assert_continues(harness, words_for, tmp_path / "whole", tmp_path / "continued", 6)


STOCK = {"bert": "BertForPreTraining", "megatron-bert": "MegatronBertForPreTraining", "albert": "AlbertForPreTraining"}
FIRST = {("bert", "sop"), ("bert", "nsp"), ("megatron-bert", "sop"), ("albert", "sop")}
CASES = [
    pytest.param(
        family, objective, STOCK[family], marks=() if (family, objective) in FIRST else pytest.mark.exhaustive
    )
    for family in STOCK
    for objective in ("sop", "nsp")
]


def pairs_batch(sentences, out, objective):
    """Pairs as a run masks them, with the tokenizer of a finished run."""
    tokenizer, number = AutoTokenizer.from_pretrained(out), np.arange(12)
    rows = SentencePairs(TokenFile(sentences / "train"), Frame.for_masked(tokenizer), 64, objective)
    batch = Masking.for_tokenizer(tokenizer, 0.3, "whole_word").make_batch(rows, number, derive_key(3, number))
    assert 0 < batch["sentence_labels"].sum() < 12
    batch["loss_denominator"] = batch["masked_weights"].sum()
    return to_device(batch, torch.device("cpu"))


def stock_pairs_loss(model, batch):
    """Both losses of a stock model."""
    labels = torch.full_like(batch["input_ids"], -100)
    row, column = (batch["masked_weights"] > 0).nonzero(as_tuple=True)
    labels[row, batch["masked_positions"][row, column]] = batch["masked_labels"][row, column]
    name = "sentence_order_label" if model.config.model_type == "albert" else "next_sentence_label"
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["document_ids"], "labels": labels}
    return model(token_type_ids=batch["token_type_ids"], **given, **{name: batch["sentence_labels"][:, 0]}).loss.item()


@pytest.mark.parametrize(("family", "objective", "stock"), CASES)
def test_pairs_of_sentences(harness, sentences, cache, tmp_path, family, objective, stock):
    """It learns, is saved as the stock class, continues bit for bit, and is fine-tuned."""
    flags = ["--model_type", family, "--sentence_objective", objective, "--masking", "whole_word"]
    flags += ["--learning_rate", 5e-3, "--init_output_bias", "zeros", "--checkpointing_steps", 8]
    flags += ["--hidden_dropout_prob", 0.1, "--save_total_limit", 9]
    words_for = lambda out: pairs_run(sentences, cache, out, *flags, steps=20)  # noqa: E731
    whole = tmp_path / "whole"
    harness.run(*words_for(whole)).check()
    course = list(losses(whole).values())
    assert len(course) == 20 and sum(course[-5:]) < sum(course[:5]) - 1
    assert 0.3 < results(whole)["eval_sentence_accuracy"] < 1 and 0 < results(whole)["eval_sentence_loss"] < 2
    shown = f"| accuracy on pairs of texts | {results(whole)['eval_sentence_accuracy']:.1%} | 50.0% |"
    assert shown in (whole / "README.md").read_text()
    model, info = AutoModelForPreTraining.from_pretrained(whole, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and type(model).__name__ == stock
    batch, data_args = pairs_batch(sentences, whole, objective), DataArguments(sentence_objective=objective)
    ours = ModelArguments(model_name_or_path=str(whole), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ours = build_mlm_model(ours, data_args, AutoTokenizer.from_pretrained(whole)).train()
    with torch.no_grad():
        assert ours(**batch).loss.item() == pytest.approx(stock_pairs_loss(model.eval(), batch), abs=1e-5)
    assert_continues(harness, words_for, whole, tmp_path / "continued", 8)
    task = tmp_path / "train.tsv"
    rows = (f"{'good' if n % 2 else 'bad'} word {n}\t{n % 2}\n" for n in range(64))
    task.write_text("sentence\tlabel\n" + "".join(rows))
    flags = ["--model_name_or_path", whole, "--train_file", task, "--validation_file", task, "--do_train", "--do_eval"]
    flags += ["--output_dir", tmp_path / "glue", "--max_train_steps", 3, "--cache_dir", cache]
    harness.run("run_glue.py", *flags).check()


def test_pairs_that_grow_longer(harness, sentences, cache, tmp_path):
    """A pair is as many sentences as fit the rows of a stage."""
    flags = ["--sentence_objective", "sop", "--max_seq_length_stages", "32:0.5,64:0.5", "--checkpointing_steps", 2]
    flags += ["--save_total_limit", 9]
    words_for = lambda out: pairs_run(sentences, cache, out, *flags, steps=8)  # noqa: E731
    assert "after step 4: rows of 64 tokens" in harness.run(*words_for(tmp_path / "whole")).check().stdout
    assert 0 < results(tmp_path / "whole")["eval_sentence_loss"] < 2
    assert_continues(harness, words_for, tmp_path / "whole", tmp_path / "continued", 6)


PARALLEL = ["--sentence_objective", "sop", "--optimizer_type", "adamw", "--learning_rate", 3e-3]
PARALLEL += ["--per_device_train_batch_size", 4]


@pytest.fixture(scope="module")
def on_one_process(harness, sentences, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    harness.run(*pairs_run(sentences, cache, out, *PARALLEL, steps=10)).check()
    return out


@pytest.mark.parametrize(
    "config",
    [
        "ddp",
        "zero3",
        *(pytest.param(one, marks=pytest.mark.exhaustive) for one in ("zero2", "fsdp", "tensor_parallel")),
    ],
)
def test_pairs_on_two_processes_equal_one(harness, on_one_process, sentences, cache, tmp_path, config):
    one, two, yaml = on_one_process, tmp_path / "two", fp32_copy(f"accelerate_configs/{config}.yaml", tmp_path)
    for rank in harness.launch(*pairs_run(sentences, cache, two, *PARALLEL, steps=10), config=yaml):
        rank.check()
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    for name in ("eval_loss", "eval_sentence_loss", "eval_sentence_accuracy", "train_tokens"):
        assert results(two)[name] == pytest.approx(results(one)[name], abs=1e-5)
    mine, yours = weights(two), weights(one)
    assert mine.keys() == yours.keys()


def test_text_that_is_not_split_into_sentences_is_refused(harness, sentences, tiny_corpus, cache, out, tmp_path):
    folder = tmp_path / "documents"
    flags = ["--tokenizer_train_vocab_size", 600, "--validation_split_percentage", 10]
    harness.run("prepare_pile_data.py", "--input", tiny_corpus, "--output_dir", folder, *flags).check()
    result = harness.run(*pairs_run(folder, cache, out, "--sentence_objective", "sop", steps=2)).check(2)
    assert "--split_sentences" in result.stderr and result.stderr.count("\n") == 1
    result = harness.run(*small_run(tiny_corpus, cache, out, "--sentence_objective", "sop", steps=2)).check(2)
    assert "--dataset_path" in result.stderr and not out.exists()
