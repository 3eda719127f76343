"""Colossal-AI in bf16: Gemini and low-level ZeRO compute the same, go on exactly, and say what they cannot do.

In fp32 its YAMLs have their rows in test_strategies.py. The chunks of a tiny model are made tiny here: as they are
shipped, a model this small would stay whole on every process.
"""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from causal import plain_perplexity
from common.errors import UserError
from common.parallel import colossalai_options
from common.parallel.launch import parse_role
from harness import TESTS
from pretraining import losses, results, training_rows, weights
from strategies import SCRIPTS, command, small_chunks

GEMINI = ["colossalai_gemini", "colossalai_gemini_auto", "colossalai_gemini_offload"]
BOUND = 1e-3  # of a loss near 6: gradients are added up in bf16, in another order
ROUNDING = 5e-3  # of a loss near 6: weights in bf16 against the fp32 copies
EIGHT = ["--max_train_steps", 8, "--checkpointing_steps", 1, "--save_total_limit", 8]


@pytest.fixture(scope="module")
def ran(harness, tiny_corpus, cache, tmp_path_factory):
    """A function of a YAML's name, a model and flags giving the folder of a run in bf16 on two processes."""
    done, judged_on = {}, tmp_path_factory.mktemp("held_out") / "held_out.txt"
    judged_on.write_text("\n\n".join(held_out(tiny_corpus)) + "\n")

    def run(name, *flags, model="opt"):
        if (name, model, flags) not in done:
            folder = tmp_path_factory.mktemp(name)
            words = command(
                model, tiny_corpus, cache, folder / "run", 2, "--validation_file", judged_on, *EIGHT, *flags
            )
            ranks = harness.launch(
                *(word for word in words if word != "--fp32"), config=small_chunks(name, folder), num_processes=None
            )
            for rank in ranks:
                rank.check()
            assert not any(rank.stdout for rank in ranks[1:])
            done[name, model, flags] = folder / "run"
        return done[name, model, flags]

    return run


def held_out(corpus):
    """The texts on which a run is judged."""
    return corpus.read_text().splitlines()[:60]


def exhaustive(*values):
    return pytest.param(*values, marks=pytest.mark.exhaustive)


GRID = [(name, "opt") for name in GEMINI] + [exhaustive(name, model) for name in GEMINI for model in ("bert", "llama")]


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


@pytest.mark.parametrize("name", ["colossalai_zero2", "colossalai_gemini_offload"])
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


def test_accumulation_equals_the_large_batch(ran):
    """Under Gemini without accumulation a chunk's gradients take the place of its parameters."""
    mine, theirs = ran("colossalai_gemini", "--per_device_train_batch_size", 8), ran("colossalai_gemini")
    assert losses(mine) == pytest.approx(losses(theirs), abs=BOUND)
    norms = [[row["grad_norm"] for row in training_rows(folder)] for folder in (mine, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


@pytest.mark.parametrize("name", ["colossalai_zero2", *GEMINI])
def test_gradients_are_clipped(ran, name):
    """Adam's first moment after one step is (1 - beta1) times the clipped gradient; Gemini's on the host forgot to."""
    out = ran(name)
    state = torch.load(out / "step_1" / "optimizer.pt", weights_only=True)["state"]
    moment = torch.stack([values["exp_avg"].norm() for values in state.values()]).norm().item()
    assert training_rows(out)[0]["grad_norm"] > 0.3
    assert moment == pytest.approx((1 - 0.9) * 0.2, rel=1e-3)


@pytest.mark.parametrize("name", ["colossalai_gemini_offload", *map(exhaustive, ("colossalai_zero2", *GEMINI[:2]))])
def test_a_run_continues_bit_for_bit(ran, shows, name):
    shows(name, "run_clm.py", 2)
    whole = ran(name)
    rest = ran(name, "--resume_from_checkpoint", str(whole / "step_5"))
    assert training_rows(rest) == training_rows(whole)[5:]
    assert all(tensor.equal(weights(whole)[key]) for key, tensor in weights(rest).items())
    assert results(rest)["eval_loss"] == results(whole)["eval_loss"]


@pytest.mark.exhaustive
def test_a_run_continues_under_another_yaml(ran):
    whole = ran("colossalai_zero2")
    rest = ran("colossalai_gemini", "--resume_from_checkpoint", str(whole / "step_5"))
    expected = {step: loss for step, loss in losses(whole).items() if step > 5}
    assert losses(rest) == pytest.approx(expected, abs=BOUND)


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


# ---- What is refused -------------------------------------------------------------------------------------

REFUSED = [
    ("colossalai", "needs plugin=, one of ddp, zero1, zero2, gemini; not ''"),
    ("colossalai plugin=zero3", "not 'zero3'"),
    ("colossalai plugin=hybrid", "take accelerate_configs/tensor_parallel.yaml"),
    ("colossalai plugin=fsdp", "take accelerate_configs/fsdp.yaml"),
    ("colossalai plugin=zero1 stage=2", "stage=2 is no option of plugin=zero1"),
    ("colossalai plugin=zero1 cpu_offload=true", "cpu_offload=true is not understood: give one of no, yes"),
    ("colossalai plugin=gemini", "placement_policy= is not understood: give one of static, auto"),
    ("colossalai plugin=gemini placement_policy=auto offload_optim_frac=1", "offload_optim_frac=1 is no option"),
    ("colossalai plugin=gemini placement_policy=static shard_param_frac=2", "give a number from 0 to 1"),
    ("colossalai plugin=gemini placement_policy=static min_chunk_size_m=x", "give a number from 0 to 4096"),
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
        (["--fp32"], "Gemini trains in bf16 alone"),
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
