"""Published sizes of every family, and Megatron's BERT: its initialisation, and the script with its recipe."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.arguments import parse_pretraining_arguments
from common.models.footprint import parameter_count
from common.models.mlm import build_mlm_model
from common.models.presets import SIZES_BY_TYPE
from common.pipeline.config import read_pipeline
from common.pipeline.plan import plan
from harness import REPOSITORY
from stub_shell import Shell, flag

MILLIONS = {  # of parameters, as published, with the vocabulary that they have; ALBERT's with a pooler
    "roberta": (50265, {"base": 125, "large": 355}),
    "albert": (30000, {"base": 11.7, "large": 17.7, "xlarge": 58.7, "xxlarge": 222.6}),
    "deberta": (50265, {"base": 139, "large": 405, "xlarge": 750}),
    "deberta-v2": (128100, {"xsmall": 71, "small": 142, "base": 184, "large": 435}),
    "modernbert": (50368, {"17m": 17, "32m": 32, "68m": 68, "base": 149, "large": 395}),
    "megatron-bert": (30592, {"110m": 110, "336m": 336, "1.3b": 1300, "3.9b": 3900}),
}
PUBLISHED = [(family, size) for family, (_, sizes) in MILLIONS.items() for size in sizes]


def build(family, size, *words, vocabulary=300):
    flags = ["--model_type", family, "--model_size", size, "--vocab_size", str(vocabulary), *words]
    model_args, data_args, *_ = parse_pretraining_arguments(flags)
    tokenizer = SimpleNamespace(pad_token_id=0, get_vocab=lambda: {str(token): token for token in range(300)})
    return build_mlm_model(model_args, data_args, tokenizer)


@pytest.mark.parametrize(("family", "size"), PUBLISHED)
def test_sizes_have_the_parameters_that_were_published(family, size):
    vocabulary, sizes = MILLIONS[family]
    with torch.device("meta"):
        config = build(family, size, vocabulary=vocabulary).config
    pooler = config.hidden_size**2 if family == "albert" else 0
    assert parameter_count(config, head="masked") + pooler == pytest.approx(1e6 * sizes[size], rel=0.05)


@pytest.mark.parametrize(("size", "millions", "share"), [("small", 14, 4), ("base", 110, 3), ("large", 335, 4)])
def test_electra_has_the_parameters_that_were_published(size, millions, share):
    with torch.device("meta"):
        model = build("electra", size, vocabulary=30522)
    apart = sum(p.numel() for name, p in model.named_parameters() if name.startswith("generator."))
    assert model.num_parameters() - apart == pytest.approx(1e6 * millions, rel=0.05)
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    mine, its = ([getattr(config, name) for name in names] for config in (model.config, model.generator.config))
    assert its == [*(value // share for value in mine[:3]), mine[3]]
    assert parameter_count(model.config, head="masked") == model.num_parameters()


@pytest.mark.parametrize("family", SIZES_BY_TYPE)
def test_every_family_has_the_smallest_sizes(family):
    tiny, mini = (build(family, size).config for size in ("tiny", "mini"))
    assert (tiny.hidden_size, tiny.num_hidden_layers, mini.hidden_size, mini.num_hidden_layers) == (128, 2, 256, 4)


@pytest.mark.parametrize(("size", "deviation"), [("110m", 0.02), ("1.3b", 0.013), ("3.9b", 0.011)])
def test_megatrons_initialisation(size, deviation):
    """Megatron's presets: their deviation, and what ends a block smaller by the root of twice the number of layers."""
    torch.manual_seed(0)
    model = build("megatron-bert", size, "--hidden_size", "256", "--num_hidden_layers", "3")
    assert model.config.layer_norm_eps == 1e-5
    for layer in model.bert.encoder.layer:
        for first in (layer.attention.self.query, layer.attention.self.value, layer.intermediate.dense):
            assert first.weight.std().item() == pytest.approx(deviation, rel=0.03)
        for last in (layer.attention.output.dense, layer.output.dense):
            assert last.weight.std().item() == pytest.approx(deviation / math.sqrt(6), rel=0.03)


def test_other_sizes_keep_the_initialisation_of_transformers():
    model = build("megatron-bert", "mini")
    layer = model.bert.encoder.layer[0]
    for linear in (layer.attention.self.query, layer.attention.output.dense):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.config.layer_norm_eps == 1e-12


# ---- pretrain_megatron_bert.sh -------------------------------------------------------------------


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path, "pretrain_megatron_bert.sh")


def test_the_script_gives_the_recipe(shell):
    check, launch = shell.run("336m", "pile/train", "zero2", "--max_train_steps", "10")
    assert check["argv"][-1] == "--check_arguments" and flag(launch, "--config_file").endswith("/zero2.yaml")
    words = launch["argv"][launch["argv"].index(str(shell.repository / "run_pretraining.py")) + 1 :]
    model, data, training, _ = parse_pretraining_arguments(words)
    assert (model.model_type, model.model_size, model.hidden_dropout_prob) == ("megatron-bert", "336m", 0.1)
    assert (data.max_seq_length, data.mlm_probability, data.masking) == (512, 0.15, "ngram")
    assert (training.train_batch_size, training.learning_rate, training.min_lr_ratio) == (1024, 1e-4, 0.1)
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (training.weight_decay, training.max_grad_norm, training.num_warmup_steps) == (0.01, 1.0, 10000)
    assert training.max_train_steps == 10  # the user's own comes last


def test_the_pipelines_yaml_is_the_scripts_recipe_with_sentence_order(shell, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    _, launch = shell.run("336m", "pile/train", "zero2")
    of_script = launch["argv"][launch["argv"].index(str(shell.repository / "run_pretraining.py")) + 1 :]
    pipeline = read_pipeline(REPOSITORY / "configs" / "megatron-bert-large.yaml")
    stages = {stage.name: " ".join(map(str, stage.commands)) for stage in plan(pipeline, Path("runs/x"))}
    *_, data, flags = stages["pretrain"].partition("run_pretraining.sh")[2].split(maxsplit=4)
    of_yaml = ["--dataset_path", data, *flags.split()]
    settings = [
        {name: value for group in parse_pretraining_arguments(argv)[:3] for name, value in vars(group).items()}
        for argv in (of_script, of_yaml)
    ]
    objectives = [found.pop("sentence_objective") for found in settings]
    assert objectives == ["none", "sop"]
    where = {
        "dataset_path",
        "dataset_name",
        "tokenizer_name",
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
    }
    cut = {"per_device_train_batch_size", "auto_find_batch_size", "lr_schedule", "check_arguments"}
    theirs, ours = ({n: v for n, v in found.items() if n not in where | cut} for found in settings)
    assert ours == theirs
    assert "--split_sentences true" in stages["data"]


def test_the_script_names_what_is_wrong_and_helps(shell):
    process = shell.start("336m")
    error = process.communicate()[1]
    assert process.returncode == 2 and "1 arguments" in error and "Usage: " in error
    process = shell.start("--help")
    assert "size data [accelerate-config]" in process.communicate()[0] and process.returncode == 0


def test_the_recipe_trains(harness, tiny_corpus, cache, out):
    """The script's own flags, on a model of two layers."""
    text = (REPOSITORY / "scripts" / "pretrain_megatron_bert.sh").read_text()
    lines = [line for line in text.splitlines() if line.startswith("flags")]
    words = " ".join(re.findall(r"\((.*)\)", "\n".join(lines))).replace('"${positional[0]}"', "110m").split()
    shape = ["--hidden_size", 64, "--num_hidden_layers", 2, "--max_seq_length", 64, "--train_batch_size", 8]
    data = [
        "--train_file",
        tiny_corpus,
        "--cache_dir",
        cache,
        "--tokenizer_train_vocab_size",
        600,
        "--output_dir",
        out,
    ]
    harness.run("run_pretraining.py", *words, *shape, *data, "--fp32", "--max_train_steps", 3).check()
    assert (out / "model.safetensors").exists()
