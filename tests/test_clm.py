"""Causal language models: they learn, their files can be used, their numbers agree with stock transformers."""

import json
import math
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from causal import BLOCK, OVERRIDES, causal_run, plain_perplexity
from common.clm_arguments import frozen_flags
from common.data.token_files import TokenFile
from pretraining import assert_same_run, fp32_copy, losses, results, training_rows, wait_for_step, weights

FLAGS = Path(__file__).parent / "frozen_clm_flags.txt"


@pytest.fixture(scope="module")
def finished(harness, tiny_corpus, cache, tmp_path_factory):
    """A run of 150 steps of a tiny OPT without dropout, its folder and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    overrides = f"{OVERRIDES},dropout=0.0"
    words = causal_run(tiny_corpus, cache, out, "--learning_rate", 3e-3, steps=150, batch=16, overrides=overrides)
    result = harness.run(*words).check()
    return SimpleNamespace(out=out, stdout=result.stdout)


def documents(finished, name):
    """The token ids of each prepared document."""
    folder = Path(re.search(r"prepared data *(.*)", finished.stdout)[1])
    file = TokenFile(folder / name)
    ends = file.starts + file.lengths
    return [file.tokens[begin:end].tolist() for begin, end in zip(file.starts, ends, strict=True)]


def test_it_learns_and_its_files_are_stock(finished):
    numbers = results(finished.out)
    assert numbers["eval_loss"] < numbers["unigram_loss"] - 0.1
    by_step = losses(finished.out)
    assert sum(by_step[step] for step in range(141, 151)) < sum(by_step[step] for step in range(1, 11)) - 5
    model, info = AutoModelForCausalLM.from_pretrained(finished.out, output_loading_info=True)
    assert type(model).__name__ == "OPTForCausalLM" and not any(
        info[key] for key in ("missing_keys", "unexpected_keys")
    )
    answer = pipeline("text-generation", model=str(finished.out))("The value", max_new_tokens=5, do_sample=False)
    tokenizer = AutoTokenizer.from_pretrained(finished.out)
    ids = tokenizer("The value", return_tensors="pt")["input_ids"]
    for _ in range(5):  # the likeliest token each time, until the text ends
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    assert answer[0]["generated_text"] == tokenizer.decode(ids[0], skip_special_tokens=True)
    for words in ("unigram baseline", "next tokens", "->", "real tokens/s", "text-generation", "perplexity"):
        assert words in finished.stdout, words
    card = (finished.out / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "A causal language model" in card


def test_perplexity_equals_plain_transformers(harness, finished, tiny_corpus, cache, tmp_path):
    held_out = tmp_path / "held_out.txt"
    lines = tiny_corpus.read_text().splitlines()
    held_out.write_text("\n\n".join(lines[:60]) + "\n")
    words = causal_run(tiny_corpus, cache, tmp_path / "out", "--validation_file", held_out, steps=1, overrides=None)
    harness.run(*words, "--model_name_or_path", finished.out).check()
    mine = results(tmp_path / "out")["perplexity"]
    assert mine == pytest.approx(plain_perplexity(tmp_path / "out", lines[:60]), rel=1e-5)


def test_packed_documents_do_not_see_each_other(harness, finished, tiny_corpus, cache, out):
    """The loss of packed rows is that of each document alone, by stock transformers."""
    words = causal_run(tiny_corpus, cache, out, "--packing", "documents", steps=3, overrides=None)
    result = harness.run(*words, "--model_name_or_path", finished.out).check()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    total, number = 0.0, 0
    for ids in documents(SimpleNamespace(stdout=result.stdout), "validation"):
        for begin in range(0, len(ids), BLOCK - 1):
            piece = torch.tensor([[tokenizer.bos_token_id, *ids[begin : begin + BLOCK - 1]]])
            with torch.no_grad():
                total += model(piece, labels=piece).loss.item() * (piece.shape[1] - 1)
            number += piece.shape[1] - 1
    assert results(out)["eval_loss"] == pytest.approx(total / number, abs=1e-5)


FAMILIES = {
    "opt-350m": ["--model_size", "350m", OVERRIDES.replace("word_embed_proj_dim=32", "word_embed_proj_dim=16")],
    "gpt2": ["--model_type", "gpt2", "n_embd=32,n_layer=2,n_head=2,n_positions=128"],
    "llama": [
        "--model_type",
        "llama",
        "hidden_size=32,intermediate_size=64,num_hidden_layers=2,num_attention_heads=2,num_key_value_heads=1,"
        "max_position_embeddings=128",
    ],
}


@pytest.mark.parametrize(
    ("family", "packing"),
    [
        pytest.param(family, packing, marks=() if packing == "documents" else pytest.mark.exhaustive)
        for family in FAMILIES
        for packing in ("concat", "documents")
    ],
)
def test_other_families(harness, tiny_corpus, cache, out, family, packing):
    *choice, overrides = FAMILIES[family]
    flags = [*choice, "--packing", packing, "--learning_rate", 3e-3]
    harness.run(*causal_run(tiny_corpus, cache, out, *flags, steps=25, overrides=overrides)).check()
    by_step = losses(out)
    assert by_step[25] < by_step[1] - 0.3
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    if family == "opt-350m":
        assert model.model.decoder.project_in is not None and model.model.decoder.final_layer_norm is None


def test_stopped_and_continued_equals_uninterrupted(harness, tiny_corpus, cache, tmp_path):
    """Dropout, accumulation and a checkpoint in the middle of an interval between two logs."""
    flags = ["--per_device_train_batch_size", 4, "--checkpointing_steps", 9]
    command = lambda out: causal_run(tiny_corpus, cache, tmp_path / out, *flags, steps=60)  # noqa: E731
    harness.run(*command("whole")).check()
    process = harness.start(*command("cut"), pause_at=12)
    wait_for_step(process, tmp_path / "cut", 12)
    process.kill_group()
    process.wait()
    process = harness.start(*command("cut"), "--resume_from_checkpoint", "latest", pause_at=20)
    wait_for_step(process, tmp_path / "cut", 20)
    process.signal(signal.SIGTERM)
    process.wait().check(143)
    harness.run(*command("cut"), "--resume_from_checkpoint", "latest").check()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_two_processes_equal_one(harness, tiny_corpus, cache, tmp_path):
    command = lambda out: causal_run(tiny_corpus, cache, tmp_path / out, steps=12, batch=16)  # noqa: E731
    flags = ["--per_device_train_batch_size", 4]
    harness.run(*command("one"), *flags).check()
    for rank in harness.launch(*command("two"), *flags, config=fp32_copy("accelerate_configs/cpu.yaml", tmp_path)):
        rank.check()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    mine, yours = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert max(float((mine[name] - yours[name]).abs().max()) for name in mine) < 1e-5


def test_checkpointed_activations_change_nothing(harness, tiny_corpus, cache, tmp_path):
    command = lambda out: causal_run(tiny_corpus, cache, tmp_path / out, steps=5)  # noqa: E731
    harness.run(*command("kept")).check()
    harness.run(*command("again"), "--gradient_checkpointing").check()
    assert losses(tmp_path / "kept") == losses(tmp_path / "again")


def test_random_tokens_need_no_text(harness, out):
    shape = ["--config_overrides", OVERRIDES, "--block_size", BLOCK, "--fp32", "--logging_steps", 1]
    flags = ["--synthetic_data", "--learning_rate", 3e-3, "--max_train_steps", 20, "--output_dir", out]
    harness.run("run_clm.py", *shape, *flags, "--train_batch_size", 4).check()
    by_step = losses(out)
    assert by_step[1] == pytest.approx(math.log(50272), abs=0.3) and by_step[20] < by_step[1] - 0.1
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 50272


@pytest.mark.parametrize("script", ["run_clm.py", "run_pretraining.py"])
def test_throughput_is_measured_and_nothing_saved(harness, tiny_corpus, cache, out, script):
    words = causal_run(tiny_corpus, cache, out, "--throughput_steps", 7, "--gradient_checkpointing")
    if script == "run_pretraining.py":
        words = ["--num_hidden_layers", 2, "--hidden_size", 32, "--intermediate_size", 64, "--train_file", tiny_corpus]
        words += ["--cache_dir", cache, "--tokenizer_train_vocab_size", 600, "--fp32", "--max_seq_length", BLOCK]
        words = [script, *words, "--num_attention_heads", 2, "--throughput_steps", 7, "--output_dir", out]
        words += ["--gradient_checkpointing", "--train_batch_size", 8, "--logging_steps", 1]
    result = harness.run(*words).check()
    numbers = results(out)
    assert numbers["train_steps"] == 12 and not (out / "model.safetensors").exists() and not list(out.glob("step_*"))
    tokens = [row["tokens"] for row in training_rows(out)]
    of_a_row = (tokens[-1] - tokens[-8]) / (8 * 7)  # real tokens, in the steps that were measured
    assert numbers["tokens_per_second"] == pytest.approx(of_a_row * numbers["samples_per_second"], rel=1e-6)
    assert 1 < numbers["hardware_tflops_per_device"] / numbers["model_tflops_per_device"] < 4 / 3
    for words in ("tokens/s", "samples/s", "model TFLOP/s", "hardware TFLOP/s", "peak memory"):
        assert words in result.stdout, words


def test_flags_are_frozen():
    assert frozen_flags() == FLAGS.read_text().split(), (
        "a flag came or went: update tests/frozen_clm_flags.txt and README"
    )


TINY_BLOOM = "hidden_size=32,n_layer=1,n_head=2"
BAD = {
    "unknown size": (["--model_size", "7b"], ["--model_size 7b", "125m", "175b"]),
    "batch 0": (["--per_device_train_batch_size", 0], ["--per_device_train_batch_size 0"]),
    "negative cap": (["--mem_cap", -1], ["--mem_cap -1"]),
    "long blocks": (["--block_size", 256], ["--block_size 256", "128 positions"]),
    "override": (["--config_overrides", "width=3"], ["--config_overrides width=3", "OPTConfig"]),
    "values that do not go together": (["--config_overrides", "num_attention_heads=7"], ["num_attention_heads=7"]),
    "an activation": (["--config_overrides", "activation_function=foo"], ["activation_function=foo: 'foo'"]),
    "no positions": (["--model_type", "bloom", "--config_overrides", TINY_BLOOM, "--packing", "documents"], ["bloom"]),
    "cap too small": (["--mem_cap", 0.001], ["memory cap of 0.001 GB", "too small"]),
    "no such model": (["--model_type", "ott"], ["--model_type ott"]),
    "no causal model": (["--model_type", "vit", "--config_overrides", "hidden_size=32"], ["vit", "causal"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags_end_in_one_line(harness, tiny_corpus, cache, out, case):
    flags, named = BAD[case]
    refused(harness.run(*causal_run(tiny_corpus, cache, out, *flags, steps=2)), out, named)


def refused(result, out, named):
    result.check(2)
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and not out.exists(), result.stderr
    assert all(str(name) in lines[0] for name in named), lines[0]


@pytest.fixture(scope="module")
def sharded(finished, tmp_path_factory):
    """The finished model in several shards with an index."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    AutoModelForCausalLM.from_pretrained(finished.out).save_pretrained(folder, max_shard_size="60KB")
    for path in finished.out.glob("tokenizer*"):
        shutil.copy(path, folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def damage(folder, how):
    shards, index = sorted(folder.glob("model-*.safetensors")), folder / "model.safetensors.index.json"
    if how in ("a pointer to pickled weights", "half of pickled weights"):
        weights = load_file(shards[0])
        for path in (*shards, index):
            path.unlink()
        file = folder / "pytorch_model.bin"
        torch.save(weights, file)
        whole = b"version 1: sha256" if "pointer" in how else file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        return []
    if how == "corrupt shard":
        shards[1].write_bytes(shards[1].read_bytes()[:-1000])
        return []
    if how == "missing shard":
        shards[1].unlink()
        return [shards[1].name]
    if how == "missing in the index":
        facts = json.loads(index.read_text())
        facts["weight_map"] = {name: f"{file}.absent" for name, file in facts["weight_map"].items()}
        index.write_text(json.dumps(facts))
        return []
    if how == "incomplete shard":
        tensors = load_file(shards[1])
        lost = sorted(tensors)[0]
        save_file({name: tensor for name, tensor in tensors.items() if name != lost}, shards[1], {"format": "pt"})
        return ["lacks"]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"ffn_dim": 96}))
    return []


DAMAGE = ["corrupt shard", "missing shard", "missing in the index", "incomplete shard", "another shape"]
DAMAGE += ["a pointer to pickled weights", "half of pickled weights"]


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_weights_are_refused(harness, sharded, tiny_corpus, cache, tmp_path, out, how):
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    named = damage(folder, how)
    words = causal_run(tiny_corpus, cache, out, "--model_name_or_path", folder, steps=2, overrides=None)
    refused(harness.run(*words, "--check_arguments"), out, [folder, *named])


def test_sharded_weights_are_loaded(harness, sharded, finished, tiny_corpus, cache, tmp_path):
    for name, folder in (("whole", finished.out), ("parts", sharded)):
        words = causal_run(
            tiny_corpus, cache, tmp_path / name, "--model_name_or_path", folder, steps=2, overrides=None
        )
        harness.run(*words).check()
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_a_tokenizer_that_does_not_match_is_refused(harness, finished, tiny_corpus, cache, tmp_path, out):
    words = causal_run(tiny_corpus, cache, tmp_path / "other", "--tokenizer_train_vocab_size", 1500, steps=1)
    harness.run(*words).check()
    words = causal_run(tiny_corpus, cache, out, "--model_name_or_path", finished.out, steps=2, overrides=None)
    refused(harness.run(*words, "--tokenizer_name", tmp_path / "other"), out, ["--tokenizer_name", finished.out])
    shutil.copytree(finished.out, tmp_path / "ends", ignore=shutil.ignore_patterns("step_*", "model*", "config.json"))
    facts = json.loads((tmp_path / "ends" / "tokenizer_config.json").read_text())
    facts["eos_token"] = AutoTokenizer.from_pretrained(finished.out).pad_token
    (tmp_path / "ends" / "tokenizer_config.json").write_text(json.dumps(facts))
    refused(harness.run(*words, "--tokenizer_name", tmp_path / "ends"), out, ["--tokenizer_name", "ends in id"])
