"""Colossal-AI in bf16: Gemini and low-level ZeRO compute the same, go on exactly, and say what they cannot do.

In fp32 its YAMLs have their rows in test_strategies.py. The chunks of a tiny model are made tiny here: as they are
shipped, a model this small would stay whole on every process.
"""

import functools
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, OPTConfig

from causal import plain_perplexity
from common.checkpoint import read_state
from common.errors import UserError
from common.parallel import colossalai_options
from common.parallel.launch import parse_role
from harness import REPOSITORY, TESTS
from pretraining import losses, results, training_rows, weights
from strategies import SCRIPTS, command, small_chunks

GEMINI = ["colossalai_gemini", "colossalai_gemini_auto", "colossalai_gemini_offload"]
ALL = ["colossalai_ddp", "colossalai_zero1", "colossalai_zero2", *GEMINI]
BOUND = 1e-3  # of a loss near 6: gradients are added up in bf16, in another order
ROUNDING = 5e-3  # of a loss near 6: weights in bf16 against the fp32 copies
STEPS, HALF = 4, 2
SOME = ["--max_train_steps", STEPS, "--checkpointing_steps", 1, "--save_total_limit", STEPS]


@pytest.fixture(scope="module")
def ran(harness, tiny_corpus, cache, tmp_path_factory):
    """A function of a YAML's name, flags and a model giving the folder of a run on two processes: in bf16, or in fp16
    with the scale that the loss has at first."""
    done, judged_on = {}, tmp_path_factory.mktemp("held_out") / "held_out.txt"
    judged_on.write_text("\n\n".join(held_out(tiny_corpus)) + "\n")

    def run(name, *flags, model="opt", scale=None):
        case = name, model, scale, flags
        if case not in done:
            folder = tmp_path_factory.mktemp(name)
            words = command(
                model, tiny_corpus, cache, folder / "run", 2, "--validation_file", judged_on, *SOME, *flags
            )
            config = small_chunks(name, folder)
            if scale:
                text = config.read_text().replace("mixed_precision: bf16", "mixed_precision: fp16")
                config.write_text(text.replace("initial_scale=65536", f"initial_scale={scale}"))
            ranks = harness.launch(*(word for word in words if word != "--fp32"), config=config, num_processes=None)
            for rank in ranks:
                rank.check()
            assert not any(rank.stdout for rank in ranks[1:]) and "[transformers]" not in ranks[0].stderr
            done[case] = folder / "run"
        return done[case]

    return run


def held_out(corpus):
    """The texts on which a run is judged."""
    return corpus.read_text().splitlines()[:60]


def exhaustive(*values):
    return pytest.param(*values, marks=pytest.mark.exhaustive)


GRID = [(name, "opt") for name in GEMINI] + [("colossalai_gemini", "bert")]
GRID += [exhaustive(name, "bert") for name in GEMINI[1:]] + [exhaustive(name, "llama") for name in GEMINI]
FAMILIES = ("roberta", "albert", "deberta", "deberta-v2", "modernbert", "electra", "megatron-bert")


@pytest.mark.parametrize(("name", "model"), GRID)
def test_gemini_equals_low_level_zero(ran, shows, name, model):
    shows(name, SCRIPTS[model], 2)
    mine, theirs = ran(name, model=model), ran("colossalai_zero2", model=model)
    apart = max(abs(losses(mine)[step] - losses(theirs)[step]) for step in losses(theirs))
    print(f"{name}: losses differ by at most {apart:.1e}")
    assert losses(mine).keys() == losses(theirs).keys() and apart < BOUND
    assert min(row["grad_norm"] for row in training_rows(theirs)) > 0.2, "clipping was meant to be active"
    norms = [[row["grad_norm"] for row in training_rows(folder)] for folder in (mine, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=0.02)
    assert results(mine)["eval_loss"] == pytest.approx(results(theirs)["eval_loss"], abs=BOUND)
    whole = 4 * sum(tensor.numel() for tensor in weights(mine).values())
    held = results(mine)["parameter_bytes_per_rank"]
    assert whole / 2 <= held < 0.65 * whole  # the first half of every chunk, and not all chunks are full
    assert results(mine)["optimizer_bytes_per_rank"] == 2 * held
    assert "Gemini" in results(mine)["strategy"] and results(mine)["precision"] == "bf16"


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_under_gemini(ran, family):
    flags = ["--model_type", family, "--max_train_steps", 3]
    if family != "albert":  # whose layers transformers does not recompute
        flags.append("--gradient_checkpointing")
    mine, theirs = (ran(name, *flags, model="bert") for name in ("colossalai_gemini", "colossalai_zero2"))
    assert losses(mine) == pytest.approx(losses(theirs), abs=BOUND)


@pytest.mark.parametrize("name", ALL)
def test_what_is_saved_are_the_masters(ran, tiny_corpus, name):
    """In fp32, with their tied weights, for stock transformers; the same model but for bf16's rounding."""
    out = ran(name)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.dtype == torch.float32
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    matrix = model.model.decoder.layers[0].fc1.weight
    assert not matrix.equal(matrix.bfloat16().float())
    assert math.log(plain_perplexity(out, held_out(tiny_corpus))) == pytest.approx(
        results(out)["eval_loss"], abs=ROUNDING
    )


REPEATED = [exhaustive(name) for name in ALL if name not in ("colossalai_gemini", "colossalai_gemini_offload")]


@pytest.mark.parametrize("name", ["colossalai_gemini", "colossalai_gemini_offload", *REPEATED])
def test_accumulation_equals_the_large_batch(ran, name):
    """Under Gemini without accumulation a chunk's gradients take the place of its parameters. In fp32 every YAML of
    ZeRO and data parallelism accumulates in test_strategies.py."""
    mine, theirs = ran(name, "--per_device_train_batch_size", 8), ran(name)
    assert losses(mine) == pytest.approx(losses(theirs), abs=BOUND)
    norms = [[row["grad_norm"] for row in training_rows(folder)] for folder in (mine, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_clipped(ran, name):
    """Adam's first moment after one step is (1 - beta1) times the clipped gradient; Gemini's on the host forgot to."""
    out = ran(name)
    state = torch.load(out / "step_1" / "optimizer.pt", weights_only=True)["state"]
    moment = torch.stack([values["exp_avg"].norm() for values in state.values()]).norm().item()
    assert training_rows(out)[0]["grad_norm"] > 0.3
    assert moment == pytest.approx((1 - 0.9) * 0.2, rel=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_a_run_continues_bit_for_bit(ran, shows, name):
    shows(name, "run_clm.py", 2)
    whole = ran(name)
    rest = ran(name, "--resume_from_checkpoint", str(whole / f"step_{HALF}"))
    assert training_rows(rest) == training_rows(whole)[HALF:]
    assert all(tensor.equal(weights(whole)[key]) for key, tensor in weights(rest).items())
    assert results(rest)["eval_loss"] == results(whole)["eval_loss"]


@pytest.mark.exhaustive
def test_a_run_continues_under_another_yaml(ran):
    whole = ran("colossalai_zero2")
    rest = ran("colossalai_gemini", "--resume_from_checkpoint", str(whole / f"step_{HALF}"))
    expected = {step: loss for step, loss in losses(whole).items() if step > HALF}
    assert losses(rest) == pytest.approx(expected, abs=BOUND)


# ---- fp16 ---------------------------------------------------------------------------------------------------


FITS, OVERFLOWS = 2**10, 2**26


def scale_of(checkpoint):
    """What a checkpoint says of the loss scale."""
    return torch.load(checkpoint / "optimizer.pt", weights_only=True)["scaler"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ALL[1:])
def test_fp16_equals_bf16(ran, name):
    mine, theirs = ran(name, scale=FITS), ran("colossalai_zero2")
    assert results(mine)["precision"] == "fp16" and scale_of(mine / "step_1")["scale"] == FITS
    apart = max(abs(losses(mine)[step] - losses(theirs)[step]) for step in losses(theirs))
    print(f"{name} in fp16: losses differ by at most {apart:.1e}")
    assert apart < ROUNDING
    norms = [[row["grad_norm"] for row in training_rows(folder)] for folder in (mine, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=0.02)
    test_gradients_are_clipped(lambda _: mine, name)


@pytest.mark.parametrize("name", ["colossalai_gemini", exhaustive("colossalai_zero2")])
def test_an_overflow_is_no_step_and_the_scale_goes_on(ran, name):
    """Gemini added the next gradients to those that had overflowed; Colossal-AI forgot how long ago that was."""
    whole = ran(name, scale=OVERFLOWS)
    assert list(losses(whole)) == list(range(1, STEPS + 1)) and all(map(math.isfinite, losses(whole).values()))
    assert read_state(whole / f"step_{STEPS}")["train"]["consumed_rows"] > 16 * STEPS
    state = scale_of(whole / f"step_{HALF}")
    assert state["scale"] < OVERFLOWS and 0 < state["_growth_step"] <= HALF and state["_hysteresis_step"] >= 2
    rest = ran(name, "--resume_from_checkpoint", str(whole / f"step_{HALF}"), scale=OVERFLOWS)
    assert training_rows(rest) == training_rows(whole)[HALF:]
    assert all(tensor.equal(weights(whole)[key]) for key, tensor in weights(rest).items())
    assert scale_of(rest / f"step_{STEPS}") == scale_of(whole / f"step_{STEPS}")


# ---- Lazy initialisation ------------------------------------------------------------------------------------

LARGE = {"hidden_size": 512, "word_embed_proj_dim": 256, "ffn_dim": 2048, "num_hidden_layers": 6}  # OPT-350m's kind
LARGE |= {"num_attention_heads": 8, "vocab_size": 8191, "max_position_embeddings": 126, "do_layer_norm_before": False}


LARGE_BERT = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
LARGE_BERT |= {"vocab_size": 4096, "max_position_embeddings": 128}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A function of a kind of model giving a folder with one of about 90 MB in fp32, in several shards."""

    @functools.cache
    def folder(kind):
        torch.manual_seed(1)
        path = tmp_path_factory.mktemp("large")
        if kind == "causal":
            model = AutoModelForCausalLM.from_config(OPTConfig(**LARGE), dtype=torch.float32)
        else:
            model = AutoModelForMaskedLM.from_config(BertConfig(**LARGE_BERT), dtype=torch.float32)
        model.save_pretrained(path, max_shard_size="30MB")
        return path

    return lambda kind: folder("causal" if kind == "causal" else "masked")


# Shares of the whole in fp32: what a process of four holds in bf16 and in fp32; and what it may take to come there,
# with the largest tensor and its chunks in both, and what a process has of its own. A whole one takes more than 1.
HELD = {"colossalai_gemini": (2 + 4) / 4 / 4, "colossalai_zero2": (2 + 4 / 4) / 4}
HELD["colossalai_gemini_offload"] = HELD["colossalai_gemini"]
MOST = {"colossalai_gemini": 0.85, "colossalai_gemini_offload": 0.85, "colossalai_zero2": 0.95}
LAZY = [("colossalai_zero2", "random", "masked"), ("colossalai_gemini", "folder", "classifier")]
LAZY += [exhaustive("colossalai_gemini", "random", "masked"), exhaustive("colossalai_zero2", "folder", "classifier")]
LAZY += [exhaustive(n, s, "causal") for n in ("colossalai_gemini", "colossalai_zero2") for s in ("random", "folder")]
LAZY += [exhaustive("colossalai_gemini_offload", "random", "causal")]
CLASSES = {"causal": "CausalLM", "masked": "MaskedLM", "classifier": "SequenceClassification"}


@pytest.mark.parametrize(("name", "source", "kind"), LAZY)
def test_no_process_builds_the_whole(harness, large, tmp_path, name, source, kind):
    """The numbers are those of stock transformers, to the last bit; a classifier's head is random."""
    words = [TESTS / "loaded_parts.py", large(kind), "bf16", source, f"AutoModelFor{CLASSES[kind]}"]
    ranks = harness.launch(*words, config=small_chunks(name, tmp_path), num_processes=4)
    ranks = [json.loads(rank.check().stdout.splitlines()[-1]) for rank in ranks]
    assert ranks[0]["equal"]
    for rank in ranks:
        peak = rank["private"] / rank["whole"]
        print(f"{name}, {source}, {kind}: of {rank['whole'] / 1e6:.0f} MB, peak {peak:.2f}, for {HELD[name]:.2f}")
        assert HELD[name] < peak < MOST[name]


# ---- Automatic placement ----------------------------------------------------------------------------------


TIGHT = 5e-4  # GB, for a model of 6e-4 in bf16


def placed(harness, folder, cap_gb):
    """What gemini_placement.py says of a cap: the ranks' results."""
    config = small_chunks("colossalai_gemini_auto", folder)
    config.write_text(config.read_text().replace("warmup_non_model_data_ratio=0.8", "warmup_non_model_data_ratio=0.5"))
    return harness.launch(TESTS / "gemini_placement.py", cap_gb, config=config, num_processes=None)


def test_automatic_placement_evicts_what_a_cap_leaves_no_room_for(harness, tmp_path):
    free, tight = (json.loads(placed(harness, tmp_path, cap)[0].check().stdout.splitlines()[-1]) for cap in (1, TIGHT))
    assert free["chunks"] >= 8 and free["evicted"] == 0
    assert tight["evicted"] > 0 and tight["most"] < free["most"]
    assert tight["losses"] == free["losses"]
    assert free["judged"] == pytest.approx(free["losses"][0], abs=1e-3)
    assert free["kept"], "the masters begin as the weights were, before they were rounded to bf16"


def test_a_cap_that_is_too_small_is_one_line(harness, tmp_path):
    ranks = placed(harness, tmp_path, 1e-5)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "error: Gemini's chunks do not fit" in ranks[0].stderr and "--mem_cap" in ranks[0].stderr


@pytest.mark.exhaustive
def test_the_cap_of_a_run_is_what_chunks_are_placed_by(harness, out, tmp_path):
    text = (REPOSITORY / "accelerate_configs/colossalai_gemini_auto.yaml").read_text()
    config = tmp_path / "reserves.yaml"
    config.write_text(text.replace("warmup_non_model_data_ratio=0.8", "warmup_non_model_data_ratio=0.99"))
    shape = "num_hidden_layers=4,hidden_size=512,word_embed_proj_dim=512,ffn_dim=2048,num_attention_heads=8"
    words = ["run_clm.py", "--config_overrides", shape, "--synthetic_data", "--block_size", 64, "--mem_cap", 5]
    words += ["--max_train_steps", 1, "--per_device_train_batch_size", 1, "--output_dir", out]
    ranks = harness.launch(*words, config=config, num_processes=2)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "error: Gemini's chunks do not fit the 5 GB" in ranks[0].stderr  # a hundredth of it holds none


# ---- What is refused -------------------------------------------------------------------------------------

REFUSED = [
    ("colossalai", "needs plugin=, one of ddp, zero1, zero2, gemini; not ''"),
    ("colossalai plugin=zero3", "not 'zero3'"),
    ("colossalai plugin=hybrid", "take accelerate_configs/tensor_parallel.yaml"),
    ("colossalai plugin=pipeline", "take accelerate_configs/pipeline_1f1b.yaml"),
    ("colossalai plugin=fsdp", "take accelerate_configs/fsdp.yaml"),
    ("colossalai plugin=zero1 stage=2", "stage=2 is no option of plugin=zero1"),
    ("colossalai plugin=zero1 cpu_offload=true", "cpu_offload=true is not understood: give one of no, yes"),
    ("colossalai plugin=gemini", "placement_policy= is not understood: give one of static, auto"),
    ("colossalai plugin=gemini placement_policy=auto offload_optim_frac=1", "offload_optim_frac=1 is no option"),
    ("colossalai plugin=gemini placement_policy=static shard_param_frac=2", "give a number from 0 to 1"),
    ("colossalai plugin=gemini placement_policy=static min_chunk_size_m=x", "give a number from 0 to 4096"),
    (
        "colossalai plugin=zero2 initial_scale=0",
        "initial_scale=0 is not understood: give a number from 1 to 4294967296",
    ),
    ("colossalai plugin=ddp initial_scale=2", "initial_scale=2 is no option of plugin=ddp"),
    ("colossalai plugin=gemini placement_policy=static offload_param_frac=1", "works where offload_optim_frac=1"),
]


@pytest.mark.parametrize(("role", "said"), REFUSED)
def test_a_role_that_is_not_understood_is_refused(role, said):
    with pytest.raises(UserError) as caught:
        parse_role(role)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_options_have_colossalais_defaults():
    name, options = parse_role("colossalai plugin=gemini placement_policy=static offload_optim_frac=0.5")
    assert name == "colossalai"
    assert options == {
        "plugin": "gemini",
        "placement_policy": "static",
        "min_chunk_size_m": 32.0,
        "search_range_m": 32.0,
        "initial_scale": 65536.0,
        "shard_param_frac": 1.0,
        "offload_optim_frac": 0.5,
        "offload_param_frac": 0.0,
    }


def test_another_version_is_refused(monkeypatch):
    colossalai_options.check_installed()
    monkeypatch.setattr(colossalai_options, "VERSION", "0.4.9")
    with pytest.raises(
        UserError, match="needs Colossal-AI 0.4.9, and version 0.5.0 is installed: pip install --no-deps"
    ):
        colossalai_options.check_installed()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--fp32"], "Gemini trains in bf16 or fp16"),
        (["--optimizer_type", "lion"], "Gemini has its own Adam, and Lion is another optimizer"),
        (["--auto_find_batch_size"], "--auto_find_batch_size cannot try sizes under Colossal-AI Gemini"),
    ],
)
def test_what_gemini_cannot_do_is_refused(harness, tiny_corpus, cache, tmp_path, flags, said):
    words = [word for word in command("opt", tiny_corpus, cache, tmp_path / "run", 2) if word != "--fp32"]
    precision = "no" if "--fp32" in flags else "bf16"
    config = small_chunks("colossalai_gemini", tmp_path)
    config.write_text(config.read_text().replace("mixed_precision: bf16", f"mixed_precision: '{precision}'"))
    ranks = harness.launch(*words, *flags, config=config, num_processes=None)
    assert [rank.returncode for rank in ranks] == [2, 2], ranks[0].stderr
    assert ranks[0].stderr.count("error: ") == 1 and said in ranks[0].stderr
