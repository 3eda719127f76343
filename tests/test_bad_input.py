"""What a user can get wrong ends in one line that names it, exit code 2, and nothing half-written."""

import gzip
import json
import shutil
import string

import pytest
from safetensors.torch import load_file, save_file

from common.checkpoint import latest_checkpoint
from harness import REPOSITORY
from pretraining import SMALL, fp32_copy, results, small_run


def refuse(harness, words, *named, code=2):
    """Run, and check exit code and the one line."""
    result = harness.run(*words)
    lines = [line for line in result.stderr.splitlines() if line]
    result.check(code)
    assert lines and lines[-1].startswith("error: ") and "Traceback" not in result.stderr, result.stderr
    assert all(str(name) in lines[-1] for name in named), lines[-1]
    return result


def train_on(path, cache, out, *flags):
    base = small_run(path, cache, out, *flags, steps=2)
    return base


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


LINE = "The quick brown fox jumps over the lazy dog and returns the number of times that it did so. "
BAD_FILES = {
    "missing": (None, "corpus.txt", ["corpus.txt"]),
    "empty": (b"", "corpus.txt", ["corpus.txt", "empty"]),
    "binary": (b"\x00\x01\x02" * 999, "corpus.txt", ["corpus.txt", "binary"]),
    "undecodable": (LINE.encode() * 9 + b"\n\xff\xfe bad\n", "corpus.txt", ["corpus.txt:2", "--max_bad_records"]),
    "truncated": (gzip.compress(LINE.encode() * 999)[:-99], "corpus.txt.gz", ["corpus.txt.gz"]),
    "malformed": ('{"text": "fine"}\n{"text": \n', "corpus.jsonl", ["corpus.jsonl:2", "--max_bad_records"]),
    "no column": ('{"body": "fine"}\n', "corpus.jsonl", ["--text_column", "body"]),
    "a page": ("<html><p>fine</p></html>\n", "corpus.html", ["corpus.html", "jsonl"]),
    "no text column": ("id,body\n1,fine\n", "corpus.csv", ["--text_column", "body"]),
    "too small": (f"{LINE}\nAnother one.\n", "corpus.txt", ["--max_seq_length 64"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(harness, tmp_path, out, case):
    content, name, named = BAD_FILES[case]
    path = tmp_path / name
    if content is not None:
        write(path, content)
    refuse(harness, train_on(path, tmp_path / "cache", out), *named)
    assert not out.exists()


def test_bad_records_are_skipped_up_to_the_limit(harness, tiny_corpus, tmp_path, out):
    good = [json.dumps({"text": line}) for line in tiny_corpus.read_text().splitlines()]
    path = write(tmp_path / "corpus.jsonl", "\n".join([*good[:50], "{", *good[50:], "[]"]))
    harness.run(*train_on(path, tmp_path / "cache", out, "--max_bad_records", 2)).check()
    assert results(out)["train_steps"] == 2
    refuse(harness, train_on(path, tmp_path / "cache", tmp_path / "b", "--max_bad_records", 1), "corpus.jsonl:")


def test_arguments_in_a_process(harness, tiny_corpus, cache, out):
    refuse(harness, train_on(tiny_corpus, cache, out, "--hidden_size", 33), "--hidden_size 33")
    refuse(harness, train_on(tiny_corpus, cache, out, "--no_such_flag"), "--no_such_flag")
    refuse(harness, train_on(tiny_corpus, cache, out, "--train_batch_size", 7, "--per_device", 2), "--per_device")
    flags = ["--train_batch_size", 9, "--per_device_train_batch_size", 2]
    refuse(harness, train_on(tiny_corpus, cache, out, *flags), "--train_batch_size 9")
    refuse(harness, train_on(tiny_corpus, cache, out, "--optimizer_type", "adamx"), "adamx", "adamw")
    refuse(harness, train_on(tiny_corpus, cache, out, "--optimizer_type", "nowhere:Adam"), "nowhere")
    refuse(harness, train_on(tiny_corpus, cache, out, "--hidden_act", "wavy"), "--hidden_act wavy")
    refuse(harness, train_on(tiny_corpus, cache, out, "--vocab_size", 100), "--vocab_size 100")
    flex = ["--attn_implementation", "flex_attention"]
    refuse(harness, train_on(tiny_corpus, cache, out, *flex), "--attn_implementation flex_attention", "CUDA")
    refuse(harness, train_on(tiny_corpus, cache, out, *flex, "--check_arguments"), "flex_attention", "CUDA")
    dropout = ["--attention_probs_dropout_prob", 0.1]
    refuse(harness, train_on(tiny_corpus, cache, out, *flex, *dropout), "--attention_probs_dropout_prob 0")
    refuse(harness, train_on(tiny_corpus, cache, out, "--fp16"), "--fp32", "--fp16")
    words = [word for word in train_on(tiny_corpus, cache, out, "--fp16") if word != "--fp32"]
    refuse(harness, words, "fp16 needs a GPU")
    assert not out.exists()


def test_a_launchers_precision_is_not_contradicted(harness, tiny_corpus, cache, out):
    words = train_on(tiny_corpus, cache, out)
    results_of_ranks = harness.launch(*words, config="accelerate_configs/cpu.yaml", num_processes=2)
    assert [result.returncode for result in results_of_ranks] == [2, 2]
    assert "--fp32 contradicts the launcher's mixed_precision 'bf16'" in results_of_ranks[0].stderr
    assert results_of_ranks[1].stderr.strip() == "", "one process says it"


def test_layers_that_transformers_does_not_recompute(harness, tiny_corpus, cache, out):
    words = train_on(tiny_corpus, cache, out, "--model_type", "albert", "--gradient_checkpointing")
    refuse(harness, words, "--gradient_checkpointing", "albert")


def test_weights_that_cannot_be_used(harness, tiny_corpus, cache, tmp_path, out):
    base = [SMALL[i] for i in range(8, len(SMALL))]  # without the shape
    words = ["run_pretraining.py", *base, "--train_file", tiny_corpus, "--cache_dir", cache, "--output_dir", out]
    words += ["--tokenizer_train_vocab_size", 600, "--max_train_steps", 2]
    refuse(harness, [*words, "--model_name_or_path", tmp_path], f"{tmp_path}: cannot be loaded")
    donor = tmp_path / "donor"
    harness.run(*small_run(tiny_corpus, cache, donor, "--max_position_embeddings", 64, steps=2)).check()
    long = [*words, "--model_name_or_path", donor]
    long[long.index("--max_seq_length") + 1] = 128
    refuse(harness, long, "--max_seq_length 128", "64 positions")
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = write(tmp_path / "vocab.txt", "\n".join([*specials, *string.ascii_lowercase, *map(str, range(869))]))
    bigger = [*words, "--model_name_or_path", donor, "--tokenizer_name", vocabulary]
    refuse(harness, bigger, "640", "900")
    facts = json.loads((donor / "config.json").read_text())
    (donor / "config.json").write_text(json.dumps(facts | {"intermediate_size": 96}))
    refuse(harness, [*words, "--model_name_or_path", donor], f"{donor} cannot be loaded")
    (donor / "config.json").write_text(json.dumps(facts | {"num_hidden_layers": "two"}))
    refuse(harness, [*words, "--model_name_or_path", donor], f"{donor}: cannot be loaded", "num_hidden_layers")
    (donor / "config.json").write_text(json.dumps(facts))
    (donor / "model.safetensors").unlink()
    (donor / "pytorch_model.bin").write_bytes(b"version 1: sha256")
    refuse(harness, [*words, "--model_name_or_path", donor], f"{donor} cannot be loaded")


def test_a_folder_with_another_run(harness, tiny_corpus, cache, out):
    words = small_run(tiny_corpus, cache, out, steps=2)
    harness.run(*words).check()
    (out / "my_notes.txt").write_text("keep me")
    kept = (out / "metrics.jsonl").read_text()
    refuse(harness, words, out, "--overwrite_output_dir", "--resume_from_checkpoint")
    assert (out / "metrics.jsonl").read_text() == kept
    harness.run(*small_run(tiny_corpus, cache, out, "--overwrite_output_dir", steps=3)).check()
    assert results(out)["train_steps"] == 3 and (out / "my_notes.txt").exists()
    assert sorted(path.name for path in out.glob("step_*")) == ["step_3"]


def test_a_checkpoint_that_is_none(harness, tiny_corpus, cache, tmp_path, out):
    nowhere = tmp_path / "nowhere"
    refuse(harness, train_on(tiny_corpus, cache, out, "--resume_from_checkpoint", nowhere), nowhere, "does not exist")
    (tmp_path / "step_3").mkdir()
    words = train_on(tiny_corpus, cache, out, "--resume_from_checkpoint", tmp_path / "step_3")
    refuse(harness, words, "step_3", "manifest")
    assert not (out / "metrics.jsonl").exists()


def test_a_damaged_token_file(harness, tiny_corpus, tmp_path, out):
    cache = tmp_path / "cache"
    harness.run(*train_on(tiny_corpus, cache, out)).check()
    prepared = next(cache.glob("tiny-*"))
    content = bytearray((prepared / "train.bin").read_bytes())
    content[1000] ^= 1
    (prepared / "train.bin").write_bytes(content)
    words = ["run_pretraining.py", *SMALL, "--dataset_path", prepared, "--max_train_steps", 2]
    refuse(harness, [*words, "--output_dir", tmp_path / "b", "--cache_dir", cache], "train.bin")


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(harness, tiny_corpus, cache, out):
    flags = ["--learning_rate", 1e20, "--warmup_proportion", 0.5, "--max_grad_norm", 0, "--logging_steps", 4]
    words = small_run(tiny_corpus, cache, out, *flags, "--checkpointing_steps", 1, steps=40)
    refuse(harness, words, " step ", "--learning_rate", code=3)
    kept = load_file(latest_checkpoint(out) / "model.safetensors")
    assert all(weight.isfinite().all() for weight in kept.values())
    assert not (out / "model.safetensors").exists()


def limited(folder, most):
    """A script that is run_pretraining.py where no file can be longer; as on a full disk, a write fails half-way.

    Args:
        folder: where to write it; most: bytes of a file.
    """
    path, script = folder / "limited.py", str(REPOSITORY / "run_pretraining.py")
    path.write_text(
        "import resource, runpy, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most}))\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        f"runpy.run_path({script!r}, run_name='__main__')\n"
    )
    return path


def test_a_full_disk_keeps_the_last_checkpoint(harness, tiny_corpus, cache, tmp_path, out):
    words = small_run(tiny_corpus, cache, out, "--checkpointing_steps", 2, steps=4)
    harness.run(*words).check()
    before = latest_checkpoint(out)
    more = small_run(
        tiny_corpus, cache, out, "--checkpointing_steps", 2, "--resume_from_checkpoint", "latest", steps=8
    )
    refuse(harness, [limited(tmp_path, 200_000), *more[1:]], "cannot write", "step_6")
    assert latest_checkpoint(out) == before and not list(out.glob("*.writing"))


EMA = ["--ema_decay", 0.9]
FULL = [("fsdp", EMA), ("zero2", EMA), ("zero3", []), ("tensor_parallel", EMA), ("colossalai_zero2", [])]
FULL += [("colossalai_gemini", []), ("pipeline_1f1b", EMA), ("pipeline_2bw", [])]


@pytest.mark.parametrize(
    ("name", "flags"),
    [pytest.param(*case, marks=() if case[0] == "fsdp" else pytest.mark.exhaustive, id=case[0]) for case in FULL],
)
def test_a_full_disk_ends_every_process_alike(harness, tiny_corpus, cache, tmp_path, out, name, flags):
    """The weights are too long for it, or the first stage's moments; the others have gone on to what all do then."""
    config, most = f"accelerate_configs/{name}.yaml", 300_000 if name == "pipeline_1f1b" else 100_000
    words = small_run(tiny_corpus, cache, out, "--per_device_train_batch_size", 8, *flags, steps=4, batch=16)
    words += ["--checkpointing_steps", 2]
    if "colossalai" in name:
        words.remove("--fp32")
    else:
        config = fp32_copy(config, tmp_path)
    if "pipeline" in name:
        words[words.index("--per_device_train_batch_size") + 1] = 16
    ranks = harness.launch(limited(tmp_path, most), *words[1:], config=config, num_processes=None, timeout=120)
    for rank in ranks:
        assert "Traceback" not in rank.check(2).stderr, rank.stderr
    said = [line for line in ranks[0].stderr.splitlines() if line][-1]
    assert said.startswith(f"error: cannot write checkpoint {out / 'step_2'}: "), said
    assert "free space and continue" in said and not any("error: " in rank.stderr for rank in ranks[1:])
    assert not list(out.glob("step_*"))


def test_check_arguments_prepares_and_stops(harness, tiny_corpus, tmp_path, out):
    harness.run(*train_on(tiny_corpus, tmp_path / "cache", out, "--check_arguments")).check()
    assert not out.exists() and next((tmp_path / "cache").glob("tiny-*/train.bin"))


def test_a_folder_with_files_of_ones_own(harness, tiny_corpus, cache, out):
    out.mkdir()
    for name in ("README.md", "vocab.txt"):
        (out / name).write_text("precious")
    (out / "tokenizer_notes").mkdir()
    refuse(harness, small_run(tiny_corpus, cache, out, steps=2), "README.md", "--overwrite_output_dir")
    assert (out / "vocab.txt").read_text() == "precious"
    harness.run(*small_run(tiny_corpus, cache, out, "--overwrite_output_dir", steps=2)).check()
    assert (out / "tokenizer_notes").is_dir()


def test_a_clock_that_cannot_be_replayed_costs_nothing(harness, tiny_corpus, cache, tmp_path, out):
    harness.run(*small_run(tiny_corpus, cache, out, steps=2)).check()
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = ["--overwrite_output_dir", "--replay_clock"]
    refuse(harness, small_run(tiny_corpus, cache, out, *again, tmp_path / "none", steps=2), "--replay_clock", "none")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == kept
    harness.run(*small_run(tiny_corpus, cache, out, *again, out / "clock.f64", steps=2)).check()


@pytest.mark.parametrize("place", ["/proc/frugal", "/sys/frugal", "x" * 300])
def test_places_where_nothing_can_be_written(harness, tiny_corpus, cache, place):
    refuse(harness, small_run(tiny_corpus, cache, place, steps=2), place)


@pytest.fixture(scope="module")
def finished(harness, tiny_corpus, cache, tmp_path_factory):
    """The folder of a run of one step."""
    out = tmp_path_factory.mktemp("finished") / "run"
    harness.run(*small_run(tiny_corpus, cache, out, steps=1)).check()
    return out


@pytest.mark.parametrize("fault", ["no weights", "truncated weights", "other task"])
def test_weights_that_are_damaged(harness, finished, tiny_corpus, cache, tmp_path, out, fault):
    donor = shutil.copytree(finished, tmp_path / "donor")
    file = donor / "model.safetensors"
    if fault == "no weights":
        file.unlink()
    elif fault == "truncated weights":
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        kept = {name: weight for name, weight in load_file(file).items() if "cls" not in name}
        save_file(kept, file, {"format": "pt"})
    words = [word for word in small_run(tiny_corpus, cache, out, steps=1)]
    del words[1:9]  # the shape
    refuse(harness, [*words, "--model_name_or_path", donor], "--model_name_or_path", donor)


def test_a_model_with_few_positions_finishes(harness, tiny_corpus, cache, out):
    words = small_run(tiny_corpus, cache, out, "--max_position_embeddings", 16, steps=2)
    words[words.index("--max_seq_length") + 1] = 16
    harness.run(*words).check()
    assert results(out)["train_steps"] == 2


def test_check_arguments_sees_what_the_launcher_would(harness, tiny_corpus, cache, tmp_path, out):
    words = [*train_on(tiny_corpus, cache, out), "--check_arguments"]
    harness.run(*words).check()
    for flags, env, named in (
        (["--train_batch_size", 9, "--per_device_train_batch_size", 2], {}, "--train_batch_size 9"),
        (["--train_batch_size", 7], {"WORLD_SIZE": "2"}, "--train_batch_size 7"),
        ([], {"ACCELERATE_MIXED_PRECISION": "bf16"}, "--fp32 contradicts"),
        (["--resume_from_checkpoint", tmp_path / "none"], {}, "does not exist"),
        (["--replay_clock", tmp_path / "none"], {}, "--replay_clock"),
        (["--report_to", "wandb"], {}, "--report_to wandb"),
    ):
        result = harness.run(*words, *flags, env=env).check(2)
        assert named in result.stderr and not out.exists(), result.stderr
