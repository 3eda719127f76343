"""ELECTRA: the pair against the stock transformers pair, its draws against plain ones, its runs and its folders."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_models import SHAPE, VOCABULARY, S, Tokenizer, build, gradients, packed_batch, relative_difference
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    pipeline,
)
from transformers.utils import logging

from common.arguments import DataArguments, ModelArguments, parse_pretraining_arguments
from common.convert_checkpoint import convert, find_checkpoint
from common.data.batches import Masking
from common.data.masking import random_bits
from common.errors import UserError
from common.models.mlm import build_mlm_model
from common.models.sampling import gumbel_noise, sample_tokens
from pretraining import assert_same_run, fp32_copy, losses, results, small_run, wait_for_step
from strategies import launch

logging.set_verbosity_error()
ELECTRA = ["--model_type", "electra", "--generator_size", 0.5, "--learning_rate", 5e-3, "--init_output_bias", "zeros"]


def judged_batch(batch):
    """What a batch has beside that of packed_batch where all tokens are judged."""
    keys = torch.arange(batch["masked_positions"].numel()).view_as(batch["masked_positions"]) * 0x9E3779B97F4A7
    real = (batch["document_ids"] > 0).float()
    return {"sampling_keys": keys, "token_weights": real, "token_denominator": real.sum()}


def plain_noise(keys, size):
    """[N, size] float64: Gumbel noise of common.data.masking's bits."""
    bits = random_bits(keys.numpy().view(np.uint64)[:, None], np.arange((size + 1) // 2))
    halves = bits.view("<u4")[:, :size] & 0x7FFFFFFF
    return -np.log(-np.log1p(-(halves + 0.5) / 2.0**31))


def stock_pair_loss(generator, discriminator, batch):
    """Each document on its own through both stock models: (MLM loss, RTD loss), each a mean."""
    masked = tokens = 0.0
    for row, documents in enumerate(batch["document_ids"]):
        places, labels, weights, keys = (
            batch[name][row] for name in ("masked_positions", "masked_labels", "masked_weights", "sampling_keys")
        )
        for document in documents[documents > 0].unique():
            start, number = int((documents == document).nonzero()[0]), int((documents == document).sum())
            ids = batch["input_ids"][row, start : start + number]
            logits = generator(input_ids=ids[None]).logits[0]
            mine = (places >= start) & (places < start + number)
            there, label = places[mine] - start, labels[mine]
            masked = masked + (F.cross_entropy(logits[there], label, reduction="none") * weights[mine]).sum()
            draws = logits[there].detach().double().numpy() + plain_noise(keys[mine], logits.shape[1])
            original, filled = ids.clone(), ids.clone()
            original[there], filled[there] = label, torch.from_numpy(draws.argmax(axis=1))
            judged, replaced = discriminator(input_ids=filled[None]).logits[0], (filled != original).float()
            tokens = tokens + F.binary_cross_entropy_with_logits(judged, replaced, reduction="sum")
    return masked / batch["masked_weights"].sum(), tokens / (batch["document_ids"] > 0).sum()


def judged_packed():
    packed = packed_batch()
    packed.batch |= judged_batch(packed.batch)
    return packed


# ---- The pair against stock transformers, and its draws ---------------------------------------------


@pytest.mark.parametrize("attention", ["plain", "sdpa"])
@pytest.mark.parametrize("weights", [(1.0, 50.0), (0.5, 7.0)])
def test_loss_and_gradient_equal_the_stock_pair(attention, weights, tmp_path):
    generator_weight, discriminator_weight = weights
    given = {"generator_weight": generator_weight, "discriminator_weight": discriminator_weight}
    ours = build("electra", attention, generator_size=0.5, **given).train()
    ours.save_pretrained(tmp_path)
    discriminator, info = AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    generator, of_generator = AutoModelForMaskedLM.from_pretrained(tmp_path / "generator", output_loading_info=True)
    for found in (info, of_generator):
        assert not found["missing_keys"] and not found["unexpected_keys"]
    assert type(discriminator) is ElectraForPreTraining and type(generator) is ElectraForMaskedLM
    assert discriminator.config.hidden_size == 2 * generator.config.hidden_size == 32
    packed = judged_packed()
    loss = ours(**packed.batch).loss
    masked, tokens = stock_pair_loss(generator.train(), discriminator.train(), packed.batch)
    expected = generator_weight * masked + discriminator_weight * tokens
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    theirs = gradients(discriminator)
    for name, gradient in gradients(generator).items():
        if name.startswith("electra.embeddings."):  # tied: both models' gradients add up
            theirs[name] = theirs[name] + gradient
        else:
            theirs[f"generator.{name}"] = gradient
    assert relative_difference(gradients(ours), theirs) < 1e-5
    with torch.no_grad():
        output = ours.eval()(**packed.batch)
        weights = packed.batch["token_weights"]
        assert (output.token_losses * weights).sum() / weights.sum() == pytest.approx(tokens.item(), rel=1e-5)
        assert (output.losses * packed.batch["masked_weights"]).sum() == pytest.approx(
            masked.item() * packed.batch["masked_weights"].sum().item(), rel=1e-5
        )


def test_a_document_does_not_see_its_neighbours():
    model, packed = build("electra").eval(), judged_packed()
    with torch.no_grad():
        before = model(**packed.batch).token_losses
        packed.batch["input_ids"][:, 9:14] = 7  # the middle document, and nothing else
        after = model(**packed.batch).token_losses
    assert torch.equal(before[:, :9], after[:, :9]) and torch.equal(before[:, 14:], after[:, 14:])
    assert (before[:, 9:14] != after[:, 9:14]).any()


def test_rows_without_targets_are_judged_as_they_are():
    """A row whose targets have weight 0, as one that only fills a batch, is put back, whatever is drawn for it."""
    model, batch = build("electra").eval(), judged_packed().batch
    batch["masked_weights"][0] = 0
    with torch.no_grad():
        before = model(**batch).token_losses
        batch["sampling_keys"] = batch["sampling_keys"] + 1
        after = model(**batch).token_losses
    assert torch.equal(before[0], after[0]) and (before[1:] != after[1:]).any()


def test_noise_is_a_function_of_key_and_place():
    keys = torch.tensor([-(2**63), -1, 0, 1, 2**63 - 1, 12345])
    for size in (1, 6, 7):
        np.testing.assert_allclose(gumbel_noise(keys, size).numpy(), plain_noise(keys, size), rtol=1e-4, atol=1e-5)
    state = torch.get_rng_state()
    assert gumbel_noise(keys, 7).equal(gumbel_noise(keys.flip(0), 7).flip(0))
    assert torch.get_rng_state().equal(state)


def test_draws_have_the_probabilities_of_the_generator():
    """Pearson's statistic of 200,000 draws lies where it lies in all but one of 10,000 cases."""
    torch.manual_seed(0)
    weight, bias, hidden, number = torch.randn(40, 8), torch.randn(40), torch.randn(1, 8), 200_000
    keys = torch.from_numpy(random_bits(np.uint64(1), np.arange(number)).view(np.int64))
    drawn = sample_tokens(hidden.expand(number, -1), weight, bias, keys)
    expected = number * torch.softmax(F.linear(hidden, weight, bias), dim=-1)[0].double()
    seen = torch.bincount(drawn, minlength=40).double()
    statistic = ((seen - expected) ** 2 / expected).sum().item()
    assert 39 - 3.4 * (2 * 39) ** 0.5 < statistic < 39 + 4.7 * (2 * 39) ** 0.5


def test_a_batch_names_its_draws_by_row_and_position():
    """The same rows in other company have the same keys; another epoch has others."""

    class Rows:
        seq_length, full = 16, True

        def build(self, row, _):
            ids = 10 + row[:, None] + np.arange(16)
            return {"input_ids": ids, "document_ids": np.ones_like(ids), "is_text": np.ones(ids.shape, bool)}

    masking = Masking(0.25, 300, 4, judges_tokens=True)
    rows, keys = np.arange(6), np.arange(6).astype(np.uint64)
    whole = masking.make_batch(Rows(), rows, keys)
    part = masking.make_batch(Rows(), rows[3:5], keys[3:5])
    assert (whole["sampling_keys"][3:5] == part["sampling_keys"]).all()
    assert len(np.unique(whole["sampling_keys"])) == whole["sampling_keys"].size
    later = masking.make_batch(Rows(), rows, keys + np.uint64(9))
    assert not np.isin(later["sampling_keys"], whole["sampling_keys"]).any()
    assert whole["token_weights"].all() and masking.for_validation().judges_tokens


# ---- Folders ----------------------------------------------------------------------------------------


def load(folder, **changes):
    model_args = ModelArguments(model_name_or_path=str(folder), **changes)
    return build_mlm_model(model_args, DataArguments(max_seq_length=S), Tokenizer())


def test_a_saved_pair_goes_on_as_it_was(tmp_path):
    ours, packed = build("electra", generator_size=0.5).eval(), judged_packed()
    ours.save_pretrained(tmp_path)
    again = load(tmp_path).eval()
    assert again.config.generator["hidden_size"] == 16 and again.num_parameters() == ours.num_parameters()
    with torch.no_grad():
        assert again(**packed.batch).loss == ours(**packed.batch).loss
    assert_tied(again)


def assert_tied(pair):
    words = pair.electra.embeddings.word_embeddings.weight
    assert pair.generator.electra.embeddings is pair.electra.embeddings
    assert pair.get_output_embeddings().weight is words
    assert not any(name.startswith("generator.electra.embeddings.") for name, _ in pair.named_parameters())


def test_a_pair_in_two_folders_as_it_is_published(tmp_path):
    """With a generator of another depth; --generator_name_or_path names it."""
    shape = {**SHAPE, "vocab_size": VOCABULARY, "embedding_size": 16, "pad_token_id": 0}
    discriminator = ElectraForPreTraining(ElectraConfig(**shape))
    generator = ElectraForMaskedLM(ElectraConfig(**{**shape, "hidden_size": 16, "num_hidden_layers": 3}))
    generator.save_pretrained(tmp_path / "other")
    generator.electra.embeddings.load_state_dict(discriminator.electra.embeddings.state_dict())
    discriminator.save_pretrained(tmp_path / "discriminator")
    generator.save_pretrained(tmp_path / "generator")
    pair = load(tmp_path / "discriminator", generator_name_or_path=str(tmp_path / "generator"))
    assert_tied(pair)
    packed = judged_packed()
    masked, tokens = stock_pair_loss(generator.eval(), discriminator.eval(), packed.batch)
    assert pair.train()(**packed.batch).loss.item() == pytest.approx((masked + 50 * tokens).item(), rel=1e-6)
    assert pair.config.generator["num_hidden_layers"] == 3 and pair.generator.config.hidden_dropout_prob == 0
    with pytest.raises(UserError, match="without its generator .*--generator_name_or_path"):
        load(tmp_path / "discriminator")
    with pytest.raises(UserError, match="not been trained together"):
        load(tmp_path / "discriminator", generator_name_or_path=str(tmp_path / "other"))
    with pytest.raises(UserError, match="is it the discriminator"):
        load(tmp_path / "generator", generator_name_or_path=str(tmp_path / "generator"))


def test_what_is_for_an_electra_alone_is_refused_elsewhere(tmp_path):
    build("post-ln").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--discriminator_weight is for an electra"):
        load(tmp_path, discriminator_weight=3.0)
    for words, said in (
        ("--generator_size 0.5", "--generator_size is for --model_type electra"),
        ("--model_type electra --generator_size 1.5", "--generator_size 1.5"),
        ("--model_type electra --model_size base --generator_size 0.3", "230 wide and has 4 heads"),
        ("--model_type electra --generator_name_or_path x", "needs --model_name_or_path"),
        ("--model_type electra --disc_weight -1", "--discriminator_weight -1"),
    ):
        with pytest.raises(UserError, match=said):
            parse_pretraining_arguments(words.split())
    with pytest.raises(UserError, match="--sentence_objective: an? electra has no head"):
        pairs = DataArguments(max_seq_length=S, sentence_objective="sop")
        build_mlm_model(ModelArguments(model_type="electra", **SHAPE), pairs, Tokenizer())


# ---- Runs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(harness, tiny_corpus, cache, tmp_path_factory):
    """20 steps on one process, with dropout, accumulation, checkpoints and an average of the weights."""
    out = tmp_path_factory.mktemp("whole") / "run"
    harness.run(*command(tiny_corpus, cache, out)).check()
    return out


def command(corpus, cache, out, *flags):
    flags = [*ELECTRA, "--hidden_dropout_prob", 0.1, "--per_device_train_batch_size", 4, "--eval_steps", 10, *flags]
    return small_run(corpus, cache, out, *flags, "--checkpointing_steps", 6, "--ema_decay", 0.9, steps=20)


def test_it_learns_and_both_are_saved_as_stock(whole):
    course = list(losses(whole).values())
    assert len(course) == 20 and sum(course[-5:]) < sum(course[:5]) - 1  # as other families in tests/test_families.py
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    judged = [row for row in rows if "eval_loss" in row]
    assert judged[-1]["eval_loss"] < judged[0]["eval_loss"] < 6.5
    for row in (*judged, results(whole)):
        assert 0 < row["eval_discriminator_loss"] < 0.7 and 0.7 < row["eval_discriminator_accuracy"] < 1
    for folder in (whole, whole / "ema"):
        for auto, place in ((AutoModelForPreTraining, folder), (AutoModelForMaskedLM, folder / "generator")):
            _, info = auto.from_pretrained(place, output_loading_info=True)
            assert not any(info.values()), info
    mine, its = (load_file(folder / "model.safetensors") for folder in (whole, whole / "generator"))
    tied = [name for name in mine if name.startswith("electra.embeddings.")]
    assert len(tied) == 5 and all(mine[name].equal(its[name]) for name in tied)
    assert len(pipeline("fill-mask", model=str(whole / "generator"))("a [MASK] of it")) == 5


def test_killed_and_continued(harness, whole, tiny_corpus, cache, out):
    words = command(tiny_corpus, cache, out)
    process = harness.start(*words, pause_at=13)
    wait_for_step(process, out, 13)
    process.kill_group()
    process.wait()
    assert "continuing from" in harness.run(*words, "--resume_from_checkpoint", "latest").check().stdout
    assert_same_run(whole, out)
    mine, theirs = (load_file(folder / "generator" / "model.safetensors") for folder in (out, whole))
    assert all(mine[name].equal(theirs[name]) for name in theirs)


def without_dropout(corpus, cache, out, rows):
    flags = [*ELECTRA, "--optimizer_type", "adamw", "--learning_rate", 1e-3, "--max_grad_norm", 0.2]
    return small_run(corpus, cache, out, *flags, "--per_device_train_batch_size", rows, steps=20)


@pytest.fixture(scope="module")
def on_one_process(harness, tiny_corpus, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    harness.run(*without_dropout(tiny_corpus, cache, out, 8)).check()
    return out


@pytest.mark.parametrize("config", ["cpu", "ddp", "fsdp", "zero2"])
def test_two_processes_equal_one(harness, on_one_process, tiny_corpus, cache, tmp_path, shows, config):
    """Whoever computes a row draws the same for it, so that the micro-batches may be cut differently."""
    one, two = on_one_process, tmp_path / "two"
    words = without_dropout(tiny_corpus, cache, two, 4)
    if config == "cpu":
        for rank in harness.launch(*words, config=fp32_copy("accelerate_configs/cpu.yaml", tmp_path)):
            rank.check()
    else:
        launch(harness, config, tmp_path, words)
    assert results(two)["world_size"] == 2
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    for name in ("eval_loss", "eval_discriminator_loss", "train_tokens"):
        assert results(two)[name] == pytest.approx(results(one)[name], rel=1e-5)
    for place in (".", "generator"):
        mine, theirs = (load_file(out / place / "model.safetensors") for out in (two, one))
        assert mine.keys() == theirs.keys()
        assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-4


def test_tensor_parallelism_is_refused(harness, tiny_corpus, cache, tmp_path):
    words = small_run(tiny_corpus, cache, tmp_path / "run", *ELECTRA, "--optimizer_type", "adamw", steps=2)
    config = fp32_copy("accelerate_configs/tensor_parallel.yaml", tmp_path)
    ranks = harness.launch(*words, config=config, num_processes=None)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "a electra has no plan for tensor parallelism" in ranks[0].stderr and "fsdp.yaml" in ranks[0].stderr


def test_bf16_concatenated_rows_and_checkpointing(harness, tiny_corpus, cache, out):
    words = small_run(tiny_corpus, cache, out, *ELECTRA, "--packing", "concat", "--gradient_checkpointing", steps=20)
    harness.run(*[word for word in words if word != "--fp32"], "--bf16").check()
    course = list(losses(out).values())
    assert results(out)["precision"] == "bf16" and sum(course[-5:]) < sum(course[:5]) - 5


def test_a_checkpoint_becomes_two_folders(whole, tmp_path):
    """The last checkpoint holds the final weights."""
    convert(find_checkpoint(whole), tmp_path / "model")
    for auto, place in ((AutoModelForPreTraining, "."), (AutoModelForMaskedLM, "generator")):
        found, info = auto.from_pretrained(tmp_path / "model" / place, output_loading_info=True)
        assert not any(info.values()), info
        expected = auto.from_pretrained(whole / place).state_dict()
        assert all(tensor.equal(expected[name]) for name, tensor in found.state_dict().items())
    shutil.rmtree(tmp_path / "model")
