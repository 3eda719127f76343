"""The planner of pipelines: its formulae against a simulated schedule, its memory by hand, published speed-ups."""

import json
import random
import re
import shlex
from dataclasses import replace

import pytest
import yaml
from transformers import BertConfig

from common.errors import UserError
from common.hardware_table import read_hardware, write_hardware
from common.memory import GB, Workload
from common.models.footprint import ready_step
from common.pipeline_plan import (
    SCHEDULES,
    bandwidths,
    batch_seconds,
    best_of_each,
    boundary_bytes,
    candidates,
    stage_bytes,
    stage_parameters,
)
from common.plan import describe, main
from common.profile import fitted_line, loss_of
from harness import REPOSITORY, TESTS
from plans import CONFIG, HARDWARE, V100, WORKLOAD, found
from pretraining import fp32_copy, small_run

# ---- Time: the formulae against a simulation, event by event ---------------------------------------------


def passes(schedule, depth, stage, m, batches):
    """What a stage does, in its order: ("F" or "B", number of the micro-batch)."""
    order = []
    run = m * batches if schedule == "2bw" else m  # micro-batches between flushes
    for first in range(0, m * batches, run):
        micro_batches = range(first, first + run)
        if schedule == "gpipe":
            order += [(kind, k) for kind in "FB" for k in micro_batches]
            continue
        ahead = 1 if schedule == "none" else depth - stage
        forward = backward = first
        while backward < first + run:
            if forward < first + run and forward - backward < ahead:
                order.append(("F", forward))
                forward += 1
            else:
                order.append(("B", backward))
                backward += 1
    return order


def simulate(schedule, times, exchange, m, batches):
    """When each batch's update is done on all stages.

    A pass begins when its stage is free and its input is there: from the stage before, forward, or the one behind,
    backward; a forward pass of batch t waits for the stage's update of batch t - 1, under 2bw of t - 2. A stage's
    exchange begins when its last backward pass of the batch and its exchange before are done.
    """
    depth, ended = len(times), {}
    queues = [passes(schedule, depth, stage, m, batches) for stage in range(depth)]
    free, exchanged = [0.0] * depth, [0.0] * depth
    while any(queues):
        waiting = sum(map(len, queues))
        for stage, queue in enumerate(queues):
            while queue:
                kind, k = queue[0]
                needs = [("F", stage, k)] if kind == "B" else []
                neighbour = stage - 1 if kind == "F" else stage + 1
                needs += [(kind, neighbour, k)] if 0 <= neighbour < depth else []
                update = k // m - (2 if schedule == "2bw" else 1)
                needs += [("U", stage, update)] if kind == "F" and update >= 0 else []
                needs += [("B", 0, k - 1)] if schedule == "none" and k else []
                if not all(need in ended for need in needs):
                    break
                queue.pop(0)
                free[stage] = max([free[stage], *map(ended.get, needs)]) + times[stage][kind == "B"]
                ended[kind, stage, k] = free[stage]
                if kind == "B" and k % m == m - 1:
                    exchanged[stage] = max(exchanged[stage], free[stage]) + exchange
                    ended["U", stage, k // m] = exchanged[stage]
        assert sum(map(len, queues)) < waiting, "the schedule waits for itself"
    return [max(ended["U", stage, batch] for stage in range(depth)) for batch in range(batches)]


def drawn(number, equal):
    """Stages of random times, an exchange, and a number of micro-batches."""
    draw = random.Random(number)
    depth = draw.randint(2, 6)
    times = [(draw.random(), 2 * draw.random()) for _ in range(depth)]
    return [times[0]] * depth if equal else times, draw.choice([0, 1, 5, 20]) * draw.random(), draw.randint(depth, 18)


def steady(schedule, times, exchange, m, batches=24):
    """Seconds of a batch once the pipeline is full, from the middle of many."""
    ends = simulate(schedule, times, exchange, m, batches)
    return (ends[18] - ends[6]) / 12


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("number", range(12))
def test_the_time_of_equal_stages_is_that_of_the_schedule(schedule, number):
    times, exchange, m = drawn(number, equal=True)
    assert batch_seconds(schedule, times, exchange, m) == pytest.approx(steady(schedule, times, exchange, m), rel=1e-9)


@pytest.mark.parametrize("number", range(12))
def test_the_time_of_unequal_stages(number):
    times, exchange, m = drawn(number, equal=False)
    for schedule in ("gpipe", "none"):
        (alone,) = simulate(schedule, times, 0.0, m, 1)
        assert batch_seconds(schedule, times, 0.0, m) == pytest.approx(alone, rel=1e-9), schedule
    times.sort(key=sum)  # the last stage, which has the head, is the slowest
    (alone,) = simulate("1f1b", times, exchange, m, 1)
    assert batch_seconds("1f1b", times, exchange, m) == pytest.approx(alone, rel=1e-9)
    assert batch_seconds("2bw", times, 0.0, m) == pytest.approx(steady("2bw", times, 0.0, m), rel=1e-9)


@pytest.mark.parametrize("number", range(12))
def test_the_slowest_stage_anywhere_is_never_underestimated(number):
    times, exchange, m = drawn(100 + number, equal=False)
    slowest = max(map(sum, times))
    for schedule in ("1f1b", "2bw"):
        simulated = steady(schedule, times, exchange, m)
        assert m * slowest < simulated * (1 + 1e-9) and simulated < batch_seconds(schedule, times, exchange, m) * (
            1 + 1e-9
        )


def test_the_flush_is_the_papers_bubble():
    """(d - 1) / (m + d - 1) of the time, for equal stages that exchange nothing."""
    for depth, m in ((4, 4), (4, 16), (8, 32)):
        times = [(1.0, 2.0)] * depth
        for schedule in ("1f1b", "gpipe"):
            bubble = 1 - m * 3.0 / batch_seconds(schedule, times, 0.0, m)
            assert bubble == pytest.approx((depth - 1) / (m + depth - 1))
        assert batch_seconds("2bw", times, 0.0, m) == m * 3.0


# ---- What a candidate costs, by hand ---------------------------------------------------------------------


def test_the_time_of_a_candidate_by_hand():
    """Four stages of two layers, two copies, on two machines of four devices: a stage's copies are on one machine."""
    model = WORKLOAD.footprint()
    layer = model.largest_layer
    assert layer == 4 * (64 * 64 + 64) + 2 * 64 * 256 + 256 + 64 + 4 * 64
    forward = 2 * (2 * (2 * 32 * layer + 4 * 32**2 * 64) / 1e12 + 1e-4)  # of two layers, two rows
    head = 2 * 2 * 12 * 512 * 64 / 1e12
    sent = 2 * 4 * 32 * 64 / (2e9 / 2)  # in 32 bits; the machine's two senders share its 2 GB/s
    ends = [forward + sent, forward + head + sent]
    middle = forward + 2 * sent
    backward = [3 * forward + sent, 3 * forward + 2 * sent, 3 * (forward + head) + sent]  # with recomputation
    times = [(ends[0], backward[0]), *[(middle, backward[1])] * 2, (ends[1], backward[2])]
    outside = model.parameters - 8 * layer
    exchange = 4 * (2 * layer + outside) * 2 * (1 / 2) / 10e9  # two copies near each other
    exchange += 4 * 512 * 64 / (2e9 / 2)  # the tied embedding, over both ends
    plan = found("1f1b", 4, 2, recompute=True)
    through, slowest = sum(map(sum, times)), max(map(sum, times))
    assert plan.width == 2 and plan.micro_batches == 16
    assert plan.seconds == pytest.approx(through + 15 * slowest + exchange)
    assert plan.idle == pytest.approx(1 - 16 * through / 4 / plan.seconds)
    assert plan.rows_per_second == pytest.approx(64 / plan.seconds)
    assert found("2bw", 4, 2, recompute=True).seconds == pytest.approx(max(16 * slowest, 3 * slowest + exchange))
    assert found("none", 4, 2, recompute=True).seconds == pytest.approx(16 * through + exchange)


def test_the_time_where_stages_are_neighbours_by_hand():
    """Each machine has the four stages of a copy: rows stay there, and four stages send gradients at once."""
    model = WORKLOAD.footprint()
    forward = 2 * (2 * (2 * 32 * model.largest_layer + 4 * 32**2 * 64) / 1e12 + 1e-4)
    sent = 2 * 4 * 32 * 64 / 10e9
    head = 2 * 2 * 12 * 512 * 64 / 1e12
    slowest = max(3 * forward + 4 * sent, 3 * (forward + head) + 2 * sent)  # between the ends; the last
    outside = model.parameters - 8 * model.largest_layer
    exchange = 4 * (2 * model.largest_layer + outside) / (2e9 / 4) + 4 * 512 * 64 / 10e9
    plan = found("2bw", 4, 2, recompute=False, neighbours="stages")
    assert plan.seconds == pytest.approx(max(16 * slowest, 3 * slowest + exchange))


@pytest.mark.parametrize(
    ("depth", "width", "neighbours", "expected"),
    [
        (2, 2, "stages", (10, 10)),  # all on one machine of four
        (4, 8, "stages", (10, 2 / 4)),  # four stages on each send gradients
        (2, 16, "stages", (10, 2 / 2)),
        (16, 2, "stages", (2, 2 / 4)),  # one device of a machine has the next stage elsewhere
        (4, 8, "copies", (2 / 4, 2)),
        (16, 2, "copies", (2 / 2, 10)),
        (1, 8, "stages", (float("inf"), 2)),
        (8, 1, "copies", (2, float("inf"))),
    ],
)
def test_what_sends_at_the_same_time_shares_a_machines_bandwidth(depth, width, neighbours, expected):
    assert bandwidths(HARDWARE, depth, width, neighbours) == pytest.approx([GB * link for link in expected])


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.exhaustive)])
def test_a_stage_sends_what_is_counted(harness, tiny_corpus, cache, tmp_path, precision):
    """Forward and backward; in bf16 the products alone have 16 bits."""
    words = small_run(tiny_corpus, cache, tmp_path / "run", "--per_device_train_batch_size", 16, steps=2, batch=16)
    config = "accelerate_configs/pipeline_2bw.yaml"
    if precision == "fp32":
        config = fp32_copy(config, tmp_path)
    else:
        words.remove("--fp32")
    ranks = harness.launch(TESTS / "sent_bytes.py", tmp_path / "sent", *words[1:], config=config, num_processes=None)
    assert f"{precision}, cpu" in ranks[0].check().stdout
    small = BertConfig(hidden_size=32)
    for number, rank in enumerate(ranks):
        rank.check()
        sent = json.loads((tmp_path / f"sent.{number}").read_text())
        assert len(sent) >= 2 * 4  # micro-batches of two steps
        assert set(sent) == {boundary_bytes(Workload(small, 4, 64, precision=precision))}


def test_data_parallelism_by_hand():
    """Eight copies of everything over two machines."""
    model = WORKLOAD.footprint()
    forward = 8 * (2 * (2 * 32 * model.largest_layer + 4 * 32**2 * 64) / 1e12 + 1e-4) + 2 * 2 * 12 * 512 * 64 / 1e12
    exchange = 4 * model.parameters * 2 * (7 / 8) / 2e9
    plan = found("data parallel", 1, 2, recompute=False)
    assert plan.micro_batches == 4
    assert plan.seconds == pytest.approx(3 * 3 * forward + forward + max(2 * forward, exchange))


def test_neighbours_on_one_machine_send_faster():
    one = replace(HARDWARE, devices_per_machine=8)
    assert found("2bw", 4, 2, False, hardware=one).seconds < found("2bw", 4, 2, False).seconds
    assert (
        found("2bw", 4, 2, False, hardware=one).seconds
        == found("2bw", 4, 2, False, hardware=one, neighbours="stages").seconds
    )
    with pytest.raises(UserError, match="between machines: add 'far' in GB/s"):
        candidates(WORKLOAD, replace(HARDWARE, far=None), 8, 64)
    with pytest.raises(UserError, match="between devices of a machine: add 'near' in GB/s"):
        candidates(WORKLOAD, replace(HARDWARE, near=None), 4, 64)


def test_every_shape_is_there_once_and_2bw_and_1f1b_only_with_enough_micro_batches():
    plans = candidates(WORKLOAD, HARDWARE, 8, 64)
    shapes = [(plan.schedule, plan.depth, plan.width, plan.rows, plan.micro_batches, plan.recompute) for plan in plans]
    assert len(set(shapes)) == len(shapes)
    expected = set()
    for depth in (1, 2, 4, 8):
        copies = 8 // depth
        for rows in (1, 2, 4, 8, 16, 32, 64):
            m = 64 // copies // rows
            for schedule in ("2bw", "1f1b", "gpipe", "none") if depth > 1 else ("data parallel",):
                if m and not (schedule in ("2bw", "1f1b") and m < depth):
                    expected |= {(schedule, depth, copies, rows, m, recompute) for recompute in (False, True)}
    assert set(shapes) == expected
    assert [plan.rows_per_second for plan in plans] == sorted((plan.rows_per_second for plan in plans), reverse=True)
    assert max(plan.rows for plan in candidates(WORKLOAD, HARDWARE, 8, 64, ["1f1b"], most_rows=4)) == 4


# ---- Memory: the paper's formulae with what this model holds --------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_of_a_stage_by_hand(precision):
    workload = replace(WORKLOAD, precision=precision)
    model, depth, m, rows = workload.footprint(), 4, 16, 2
    weights = 2 * model.largest_layer  # W / d; between the ends
    total = rows * 2 * model.kept[1] + 2 * model.copies[1]  # A_total(b) / d
    given = rows * 4 * 32 * 64  # A_in(b)
    spare = 2 * rows * model.widest
    expected = {
        ("2bw", False): 4 * (2 + 1 + 2) * weights + 3 * total,
        ("2bw", True): 4 * (2 + 1 + 2) * weights + 3 * given + total,
        ("1f1b", False): 4 * (1 + 1 + 2) * weights + 3 * total,
        ("1f1b", True): 4 * (1 + 1 + 2) * weights + 3 * given + total,
        ("gpipe", False): 4 * (1 + 1 + 2) * weights + m * total,
        ("gpipe", True): 4 * (1 + 1 + 2) * weights + m * given + total,
        ("none", False): 4 * (1 + 1 + 2) * weights + total,
    }
    for (schedule, recompute), size in expected.items():  # the second of four stages has three in flight
        assert stage_bytes(workload, model, schedule, depth, 1, m, recompute) == size + spare, (schedule, recompute)


def test_the_stages_have_the_whole_model_and_a_copy_of_what_is_tied():
    model = WORKLOAD.footprint()
    outside = model.parameters - 8 * model.largest_layer
    whole = sum(stage_parameters(WORKLOAD, model, 4, stage) for stage in range(4))
    assert model.tied and whole == model.parameters + outside
    assert stage_parameters(WORKLOAD, model, 1, 0) == model.parameters
    of_head = {512 * 64, 64 * 64 + 64, 2 * 64, 512}  # tied matrix; transformation, its norm, bias
    assert outside >= sum(of_head)


def test_what_does_not_fit_is_left_out():
    plans = candidates(WORKLOAD, HARDWARE, 8, 64)
    memory = sorted(plan.memory for plan in plans)[len(plans) // 2]
    best = best_of_each(plans, memory)
    assert all(plan.memory <= memory for plan in best)
    for plan in best:
        rivals = [p for p in plans if (p.schedule, p.depth) == (plan.schedule, plan.depth) and p.memory <= memory]
        assert plan.rows_per_second == max(rival.rows_per_second for rival in rivals)
    assert {(p.schedule, p.depth) for p in best} == {(p.schedule, p.depth) for p in plans if p.memory <= memory}


def test_layers_that_share_their_weights_are_refused(tmp_path):
    config = {"model_type": "albert", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(str(config | {"intermediate_size": 256}).replace("'", '"'))
    with pytest.raises(UserError, match="the layers of a albert share their weights"):
        main([str(tmp_path), "2", "16", "--train_batch_size", "8", "--hardware", str(REPOSITORY / V100)])


# ---- Paper scale: docs/planner.md ----------------------------------------------------------------------------

PAGE = (REPOSITORY / "docs/planner.md").read_text()


def predictions(model, devices, batch, length):
    """Rows/s of the fastest candidate of each schedule that fits, by schedule; fp16, as in the paper."""
    workload, _ = describe(model, 1, length)
    hardware = read_hardware(REPOSITORY / V100)
    plans = candidates(replace(workload, precision="fp16"), hardware, devices, batch, neighbours="copies")
    best = {}
    for plan in best_of_each(plans, GB * hardware.memory):
        best.setdefault(plan.schedule, plan.rows_per_second)
    return best


def test_the_command_of_the_page_prints_what_stands_there(capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    command, shown = re.search(
        r"```bash\nbash scripts/plan.sh (2.2b [^\n]*)\n```\n\n```text\n(.*?)```", PAGE, re.S
    ).groups()
    main(shlex.split(command))
    assert capsys.readouterr().out == shown


def test_the_table_of_published_speed_ups():
    rows = re.findall(r"^\| (\S+) \| (\d+) \| (\d+) \| (.+?) \| (.+?) \| ([\d.]+) \|$", PAGE, re.M)
    assert len(rows) >= 10
    for model, devices, batch, what, _, predicted in rows:
        best = predictions(model, int(devices), int(batch), 512)
        first, _, second = what.partition(" / ")
        names = {"2BW": "2bw", "flush": "1f1b", "GPipe": "gpipe", "no input pipelining": "none"}
        value = best[names[first.removesuffix(", rows/s")]] / (best[names[second]] if second else 1)
        assert f"{value:.3g}" == predicted, (model, devices, batch, what)


@pytest.mark.parametrize("model", ["2.2b", "3.8b"])
@pytest.mark.parametrize(("devices", "batch"), [(8, 256), (64, 512), (64, 2048)])
def test_the_ranking_is_the_papers(model, devices, batch):
    best = predictions(model, devices, batch, 512)
    assert best["2bw"] > best["1f1b"] >= best["gpipe"] > best["none"]
    assert "data parallel" not in best  # does not fit


# ---- The hardware table ---------------------------------------------------------------------------------------


def test_a_table_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "new" / "hardware.yaml"
    for hardware in (HARDWARE, replace(HARDWARE, near=None, far=None, layer_overhead=0.0, precision="fp32")):
        write_hardware(hardware, path, "by hand")
        assert read_hardware(path) == hardware and path.read_text().startswith("# by hand\n")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"memory": None}, "memory None: give a number above 0"),
        ({"memory": 0}, "memory 0: give a number above 0"),
        ({"flops": "45e12"}, "flops 45e12: give a number above 0"),
        ({"layer_overhead": -1}, "layer_overhead -1: give"),
        ({"devices_per_machine": 1.5}, "devices_per_machine 1.5: give"),
        ({"near": True}, "near True: give"),
        ({"precision": "int4"}, "precision int4: give one of bf16, fp16, fp32"),
        ({"cores": 4}, "'cores' is unknown: a hardware table has devices_per_machine, memory"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, change, expected):
    path = tmp_path / "hardware.yaml"
    path.write_text(yaml.safe_dump({name: getattr(HARDWARE, name) for name in HARDWARE.__dataclass_fields__} | change))
    with pytest.raises(UserError, match=expected) as caught:
        read_hardware(path)
    assert str(path) in str(caught.value)


def test_what_is_no_table(tmp_path):
    path = tmp_path / "hardware.yaml"
    with pytest.raises(UserError, match="hardware.yaml cannot be read: measure this machine with --profile"):
        read_hardware(path)
    for text, expected in (
        ("a: [", "is no YAML"),
        ("- 1", "devices_per_machine is missing: give GPUs"),
        ("", "missing"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=expected):
            read_hardware(path)


def test_a_line_through_times():
    assert fitted_line((1, 2, 4), (5.0, 7.0, 11.0)) == pytest.approx((2.0, 3.0))
    assert fitted_line((1, 2, 4), (2.0, 4.0, 8.0)) == pytest.approx((2.0, 0.0))
    assert fitted_line((1, 2, 4), (1.0, 4.0, 10.0))[1] == 0.0  # never below


def test_what_is_timed_is_a_training_step():
    """Its loss reaches every matrix of the layers, with and without a masked head."""
    causal = describe("125m", 1, 32)[0].config
    causal.num_hidden_layers = 1
    for config, head in ((CONFIG, {"head": "masked", "targets": 12, "packed": True}), (causal, {})):
        model, run = ready_step(config, 32, **head)
        loss_of(run(2)).backward()
        layers = [p for name, p in model.named_parameters() if re.search(r"layers?\.0\.", name) and p.dim() == 2]
        assert len(layers) == 6 and all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in layers)


# ---- The script -----------------------------------------------------------------------------------------------


def test_this_machine_is_measured_and_planned_with(capsys, tmp_path):
    path = tmp_path / "hardware.yaml"
    words = ["tiny", 2, 4, 8, 32, "--profile", "--hardware", path, "--train_batch_size", 16, "--schedule", "1f1b"]
    main([str(word) for word in words])
    printed = capsys.readouterr().out
    hardware = read_hardware(path)
    assert hardware.far is None and hardware.memory > 0.1 and hardware.flops > 1e6
    assert (hardware.near is None) == (hardware.devices_per_machine == 1)
    assert path.read_text() in printed
    _, *table, command = [line.split() for line in printed.splitlines() if line.startswith("  ")]
    assert {row[0] for row in table} <= {"1f1b", "data"} and len(table) == 2
    assert command[:2] == ["accelerate", "launch"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["125m", 2, "--train_batch_size", 0], "--train_batch_size 0 is too small"),
        (["125m", 2, "--train_batch_size", 8, "--schedule", "zero"], "--schedule zero is unknown: choose one of 2bw"),
        (["125m", 2, "--train_batch_size", 8, "--hardware", "no.yaml"], "hardware table no.yaml cannot be read"),
        (["125m", 2, "--profile", "--neighbours", "all"], "--neighbours all is unknown: choose one of stages, copies"),
        (["125m", "--train_batch_size", 8], "1 arguments before the flags"),
        (["125m", 2, "--schedule", "2bw"], "2 arguments before the flags"),
        (["125m", 2, "--profile", "--verify"], "--verify needs --train_batch_size"),
        (["125m", 2, 8, "--train_file", "a.txt"], "--train_file is for --verify"),
        (
            ["tiny", 999, "--verify", "--train_batch_size", 8, "--hardware", REPOSITORY / V100],
            "--verify: this machine",
        ),
        (["13b", 2, 1, "--train_batch_size", 8, "--hardware", REPOSITORY / V100], "no pipeline of 13b fits 1 GB"),
        (["125m", 2, "--train_batch", 8], "unknown argument --train_batch: did you mean --train_batch_size?"),
    ],
)
def test_bad_input_is_one_line(words, expected):
    with pytest.raises(UserError, match=re.escape(expected)) as caught:
        main([str(word) for word in words])
    assert "\n" not in str(caught.value)
