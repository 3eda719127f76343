"""Every model family with every way of masking: it learns, is saved as stock transformers' own, and is fine-tuned."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_electra import stock_pair_loss
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer

from common.arguments import DataArguments, ModelArguments
from common.data.batches import Masking, to_device
from common.data.masking import derive_key
from common.data.packing import DocumentRows, Frame
from common.models.mlm import build_mlm_model
from pretraining import losses, results, small_run
from strategies import launch

FAMILIES = ("bert", "megatron-bert", "roberta", "albert", "deberta", "deberta-v2", "modernbert", "electra")
MASKINGS = ("token", "whole_word", "ngram")
FIRST = {
    ("roberta", "whole_word"),
    ("albert", "ngram"),
    ("bert", "ngram"),
    ("deberta", "token"),
    ("deberta-v2", "token"),
    ("modernbert", "token"),
    ("electra", "whole_word"),
}
CONFIGS = ("ddp", "fsdp", "zero2", "zero3")
FIRST_CONFIGS = {("deberta", "fsdp"), ("deberta-v2", "zero2"), ("modernbert", "ddp")}  # an electra: test_electra.py


@pytest.fixture(scope="module")
def trained(harness, tiny_corpus, cache, tmp_path_factory):
    """A function of a family and a way of masking giving the folder of a run of 20 steps."""

    def run(family, masking):
        out = tmp_path_factory.mktemp(family) / "run"
        flags = ["--model_type", family, "--masking", masking, "--learning_rate", 5e-3, "--init_output_bias", "zeros"]
        harness.run(*small_run(tiny_corpus, cache, out, *flags, steps=20)).check()
        return out

    return functools.cache(run)


@pytest.mark.parametrize(
    ("family", "masking"),
    [
        pytest.param(family, masking, marks=() if (family, masking) in FIRST else pytest.mark.exhaustive)
        for family in FAMILIES
        for masking in MASKINGS
    ],
)
def test_it_learns_and_is_saved_as_stock(trained, tiny_corpus, tmp_path, family, masking):
    out = trained(family, masking)
    course = list(losses(out).values())
    assert len(course) == 20 and sum(course[-5:]) < sum(course[:5]) - 1
    stock = AutoModelForPreTraining if family == "electra" else AutoModelForMaskedLM
    model, info = stock.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.model_type == family and results(out)["train_steps"] == 20
    batch = masked_batch(tiny_corpus, out, tmp_path / "rows", masking, judges_tokens=family == "electra")
    ours = build_mlm_model(
        ModelArguments(model_name_or_path=str(out)), DataArguments(), AutoTokenizer.from_pretrained(out)
    )
    with torch.no_grad():
        loss = ours.train()(**batch).loss
        if family == "electra":
            masked, tokens = stock_pair_loss(AutoModelForMaskedLM.from_pretrained(out / "generator"), model, batch)
            assert loss.item() == pytest.approx((masked + 50 * tokens).item(), rel=1e-6)
        else:
            assert loss.item() == pytest.approx(stock_loss(model, batch), abs=1e-5)


def masked_batch(corpus, out, rows_folder, masking, judges_tokens):
    """Rows of several documents each, as a run masks them, with the tokenizer of a finished run."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    lines = corpus.read_text().splitlines()[:60]
    ids = tokenizer(lines, add_special_tokens=False).input_ids
    documents = [np.array(tokens[: 8 + number]) for number, tokens in enumerate(ids)]  # of many lengths
    lengths = np.array([len(document) for document in documents])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    file = SimpleNamespace(tokens=np.concatenate(documents), starts=starts, lengths=lengths)
    rows = DocumentRows(file, Frame.for_masked(tokenizer), 64, rows_folder)
    number = np.arange(len(rows))
    masking = Masking.for_tokenizer(tokenizer, 0.3, masking, judges_tokens=judges_tokens)
    batch = masking.make_batch(rows, number, derive_key(3, number))
    assert batch["document_ids"].max() > 1
    batch["loss_denominator"] = batch["masked_weights"].sum()
    if judges_tokens:
        batch["token_denominator"] = batch["token_weights"].sum()
    return to_device(batch, torch.device("cpu"))


def stock_loss(model, batch):
    """The mean over what is masked, each document by itself through a stock model."""
    losses = []
    for row, documents in enumerate(batch["document_ids"]):
        masked = batch["masked_weights"][row] > 0
        labels = torch.full_like(documents, -100)
        labels[batch["masked_positions"][row][masked]] = batch["masked_labels"][row][masked]
        for document in documents[documents > 0].unique():
            here = documents == document
            logits = model(input_ids=batch["input_ids"][row, here][None]).logits[0]
            wanted = labels[here] >= 0
            losses.append(torch.nn.functional.cross_entropy(logits[wanted], labels[here][wanted], reduction="none"))
    return torch.cat(losses).mean().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_glue_and_another_run_start_from_it(harness, trained, tiny_corpus, cache, tmp_path, family):
    out = trained(family, dict(FIRST).get(family, "token"))
    task = tmp_path / "train.tsv"
    task.write_text(
        "sentence\tlabel\n" + "".join(f"{'good' if n % 2 else 'bad'} word {n}\t{n % 2}\n" for n in range(64))
    )
    flags = ["--model_name_or_path", out, "--train_file", task, "--validation_file", task, "--do_train", "--do_eval"]
    flags += ["--output_dir", tmp_path / "glue", "--max_train_steps", 3, "--cache_dir", cache]
    harness.run("run_glue.py", *flags).check()
    more = ["--model_name_or_path", out, "--max_seq_length", 64, "--train_file", tiny_corpus, "--cache_dir", cache]
    more += ["--max_train_steps", 1, "--train_batch_size", 8, "--output_dir", tmp_path / "more", "--fp32"]
    more += ["--max_eval_samples", 32, "--attn_implementation", "sdpa", "--learning_rate", 1e-12]
    harness.run("run_pretraining.py", *more).check()
    assert results(tmp_path / "more")["eval_loss"] == pytest.approx(results(out)["eval_loss"], rel=1e-5)
    assert (tmp_path / "more" / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()


def four_steps(corpus, cache, out, family, rows):
    flags = ["--model_type", family, "--optimizer_type", "adamw", "--learning_rate", 1e-3]
    return small_run(corpus, cache, out, *flags, "--per_device_train_batch_size", rows, steps=4)


@pytest.fixture(scope="module")
def on_one_process(harness, tiny_corpus, cache, tmp_path_factory):
    """A function of a family giving the folder of its run on one process."""

    def run(family):
        out = tmp_path_factory.mktemp("one") / "run"
        harness.run(*four_steps(tiny_corpus, cache, out, family, 8)).check()
        return out

    return functools.cache(run)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        pytest.param(family, config, marks=() if (family, config) in FIRST_CONFIGS else pytest.mark.exhaustive)
        for family in FAMILIES
        for config in CONFIGS
    ],
)
def test_two_processes_equal_one(harness, on_one_process, tiny_corpus, cache, tmp_path, family, config):
    launch(harness, config, tmp_path, four_steps(tiny_corpus, cache, tmp_path / "two", family, 4))
    assert losses(tmp_path / "two") == pytest.approx(losses(on_one_process(family)), rel=1e-5)
