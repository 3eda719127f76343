"""Weights load shard by shard, and of each tensor a process reads what it holds: the whole is in no one's memory."""

import functools
import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

from causal import OVERRIDES, causal_run
from harness import TESTS
from pretraining import fp32_copy, losses, results, wait_for_step

CUT = {"fsdp": 2, "fsdp_offload": 2, "hsdp": 2, "tensor_parallel": 1, "tensor_parallel_fsdp": 2}  # readers of rows
CUT |= {"zero3": 2, "zero3_offload": 2}
# Above its part, as a share of the whole: what is being converted, and the process's own. DeepSpeed can only cut a
# tensor that is whole, and leaves gaps in the heap where it was.
MORE = {"zero3": 0.4, "zero3_offload": 0.4}
FIRST = ("fsdp", "zero3")
GRID = [pytest.param(name, marks=() if name in FIRST else pytest.mark.exhaustive) for name in CUT]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
NOTE = "note: every process reads"
LARGE = {"hidden_size": 512, "word_embed_proj_dim": 256, "ffn_dim": 2048, "num_hidden_layers": 6}  # OPT-350m's kind
LARGE |= {"num_attention_heads": 8, "vocab_size": 8191, "max_position_embeddings": 126, "do_layer_norm_before": False}


def launch(harness, tmp_path, name, words, processes=None):
    """Run a YAML's ranks to their end. Returns: what each has printed."""
    config = fp32_copy(f"accelerate_configs/{name}.yaml", tmp_path)
    return [rank.check().stdout for rank in harness.launch(*words, config=config, num_processes=processes)]


def loaded(harness, tmp_path, name, folder, processes=None):
    """What each rank says of a model that it loads and cuts, and whether there was a note."""
    printed = launch(harness, tmp_path, name, [TESTS / "loaded_parts.py", folder], processes)
    return [json.loads(text.splitlines()[-1]) for text in printed], NOTE in printed[0]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A function of a precision's name giving a folder with a model of 85 MB in fp32, in several shards."""
    torch.manual_seed(0)
    model, folder = AutoModelForCausalLM.from_config(OPTConfig(**LARGE), dtype=torch.float32), {}
    for name, dtype in DTYPES.items():
        folder[name] = tmp_path_factory.mktemp("large") / name
        model.to(dtype).save_pretrained(folder[name], max_shard_size="30MB")
        assert len(list(folder[name].glob("model-*.safetensors"))) > 1
    return folder.get


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GRID)
def test_no_process_holds_the_whole(harness, large, tmp_path, name, dtype):
    ranks, noted = loaded(harness, tmp_path, name, large(dtype))
    assert ranks[0]["equal"] and not noted
    for rank in ranks:
        share = {key: rank[key] / rank["whole"] for key in ("private", "held")}
        print(
            f"{name} {dtype}: of {rank['whole'] / 1e6:.0f} MB, held {share['held']:.2f}, peak {share['private']:.2f}"
        )
        assert share["held"] < 0.75 and share["private"] < share["held"] + MORE.get(name, 0.2)


@pytest.mark.exhaustive
def test_parts_of_different_size(harness, large, tmp_path):
    ranks, _ = loaded(harness, tmp_path, "fsdp", large("fp16"), processes=3)
    assert ranks[0]["equal"] and len({rank["held"] for rank in ranks}) > 1


SMALL = {
    "llama": LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=64),
}


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.exhaustive
def test_other_families(harness, tmp_path, family):
    """Buffers that are in no file among them, an untied head, names without the prefix of the base model."""
    folder = tmp_path / "model"
    model = AutoModelForCausalLM.from_config(SMALL[family], dtype=torch.float16)
    (model.base_model if family == "gpt2" else model).save_pretrained(folder)
    ranks, noted = loaded(harness, tmp_path, "fsdp", folder)
    assert ranks[0]["equal"] and not noted and ranks[0]["held"] < ranks[0]["whole"]


def other_file(folder, how):
    """Change a folder so that its weights cannot be read in parts."""
    tensors = load_file(folder / "model.safetensors")
    if how == "pickled":
        torch.save(tensors, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        return
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("how", ["pickled", pytest.param("tied twice", marks=pytest.mark.exhaustive)])
def test_what_cannot_be_read_in_parts_is_read_whole(harness, tmp_path, how):
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(OPTConfig(**LARGE | {"num_hidden_layers": 1})).save_pretrained(folder)
    other_file(folder, how)
    ranks, noted = loaded(harness, tmp_path, "fsdp", folder)
    assert ranks[0]["equal"] and noted and ranks[0]["held"] < ranks[0]["whole"]


# ---- The script ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(harness, tiny_corpus, cache, tmp_path_factory):
    """A function of a precision's name giving a folder with a tiny OPT and its tokenizer, in several shards."""
    out, folders = tmp_path_factory.mktemp("small") / "run", {}
    words = causal_run(tiny_corpus, cache, out, steps=1, overrides=f"{OVERRIDES},dropout=0.0")
    harness.run(*words).check()
    for name, dtype in DTYPES.items():
        folders[name] = out.parent / name
        model = AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
        model.save_pretrained(folders[name], max_shard_size="60KB")
        for path in out.glob("tokenizer*"):
            shutil.copy(path, folders[name])
        assert len(list(folders[name].glob("model-*.safetensors"))) > 1
    return folders.get


def command(corpus, cache, out, folder, readers, *flags):
    """12 steps of a loaded model, 16 rows in each, in 2 micro-batches on each of `readers` processes."""
    flags = ["--per_device_train_batch_size", 8 // readers, "--learning_rate", 3e-3, *flags]
    flags = ["--model_name_or_path", folder, "--optimizer_type", "adamw", "--max_grad_norm", 0.2, *flags]
    return causal_run(corpus, cache, out, *flags, steps=12, batch=16, overrides=None)


@pytest.fixture(scope="module")
def on_one_process(harness, small, tiny_corpus, cache, tmp_path_factory):
    """A function of a precision's name giving the folder of a run on one process."""

    def run(dtype):
        out = tmp_path_factory.mktemp("one") / "run"
        harness.run(*command(tiny_corpus, cache, out, small(dtype), 1)).check()
        return out

    return functools.cache(run)


@pytest.mark.parametrize("dtype", ["fp16", pytest.param("fp32", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", GRID)
def test_training_equals_one_process(harness, small, on_one_process, tiny_corpus, cache, tmp_path, name, dtype):
    one, out = on_one_process(dtype), tmp_path / "run"
    printed = launch(harness, tmp_path, name, command(tiny_corpus, cache, out, small(dtype), CUT[name]))[0]
    assert NOTE not in printed
    assert losses(out) == pytest.approx(losses(one), abs=1e-5)
    assert results(out)["eval_loss"] == pytest.approx(results(one)["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("name", GRID)
def test_a_stopped_run_continues(harness, small, on_one_process, tiny_corpus, cache, tmp_path, name):
    out = tmp_path / "run"
    words = command(tiny_corpus, cache, out, small("fp16"), CUT[name])
    config = fp32_copy(f"accelerate_configs/{name}.yaml", tmp_path)
    ranks = harness.start_ranks(*words, config=config, num_processes=None, pause_at=4)
    wait_for_step(ranks[0], out, 4)
    ranks[0].signal(signal.SIGTERM)
    assert {rank.wait().returncode for rank in ranks} == {143}
    launch(harness, tmp_path, name, [*words, "--resume_from_checkpoint", "latest"])
    assert losses(out) == pytest.approx(losses(on_one_process("fp16")), abs=1e-5)


def test_an_incomplete_shard_ends_all_processes_in_one_line(harness, small, tiny_corpus, cache, tmp_path):
    folder, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(small("fp16"), folder)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    tensors = load_file(shard)
    lost = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, shard, {"format": "pt"})
    config = fp32_copy("accelerate_configs/fsdp.yaml", tmp_path)
    ranks = harness.launch(*command(tiny_corpus, cache, out, folder, 2), config=config, num_processes=None)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert ranks[0].stderr.count("error: ") == 1 and f"{folder} lacks {lost}" in ranks[0].stderr
    assert not any("Traceback" in rank.stderr for rank in ranks)
