"""PipeDream's conf.json: its own files mean what they mean there, and a wrong entry is named."""

import json

import pytest

from common.errors import UserError
from common.parallel.stage_map import read_stage_map

TWO = {"module_to_stage_map": [0, 1, 1], "stage_to_rank_map": {"0": [0], "1": [1]}}


@pytest.fixture
def read(tmp_path):
    """Returns: function of a dictionary, or of a file's text, that reads it as a conf.json."""

    def read_text(conf, write=json.dumps):
        path = tmp_path / "conf.json"
        path.write_text(conf if isinstance(conf, str) else write(conf))
        return read_stage_map(path)

    return read_text


def driver_conf(depth, width):
    """What PipeDream-2BW's driver_sweep.py makes for a pipeline of `depth` stages with `width` replicas each."""
    ranks = {str(stage): list(range(stage * width, (stage + 1) * width)) for stage in range(depth)}
    return {"module_to_stage_map": [*range(depth), depth - 1], "stage_to_rank_map": ranks}


@pytest.mark.parametrize("write", [json.dumps, str])
def test_the_files_of_pipedreams_readme(read, write):
    """Eight stages on 64 GPUs; the README prints it with single quotes."""
    conf = driver_conf(8, 8)
    assert ("'stage_to_rank_map': {'0': [0, 1, 2, 3, 4, 5, 6, 7], '1': [8," in write(conf)) == (write is str)
    stages = read(conf, write)
    assert stages.modules == (1,) * 8 and stages.processes == 64 and stages.warm_up is None
    assert stages.ranks[7] == tuple(range(56, 64)) and [stages.stage_of(rank) for rank in (0, 7, 8, 63)] == [
        0,
        0,
        1,
        7,
    ]
    assert stages.layers(24) == [range(3 * stage, 3 * stage + 3) for stage in range(8)]


def test_pure_data_parallelism(read):
    """Its pre-training to accuracy: nine modules on one stage of 16 processes."""
    stages = read({"module_to_stage_map": [0] * 9, "stage_to_rank_map": {"0": list(range(16))}})
    assert stages.modules == (8,) and stages.layers(24) == [range(24)] and stages.ranks == (tuple(range(16)),)


def test_uneven_stages_with_replicas_of_their_own(read):
    """PipeDream's hybrid configurations: 15 processes and one; warm-up as it is written there."""
    conf = {"module_to_stage_map": [0, 0, 0, 1, 1], "stage_to_rank_map": {"0": list(range(15)), "1": [15]}}
    stages = read(conf | {"stage_to_depth_map": {"0": 1, "1": 0}})
    assert stages.modules == (3, 1) and [len(ranks) for ranks in stages.ranks] == [15, 1]
    assert stages.layers(8) == [range(6), range(6, 8)] and stages.warm_up == (1, 0)
    stages.check_processes(16)


def test_stages_whose_keys_are_numbers_and_in_any_order(read):
    stages = read({"module_to_stage_map": (0, 1, 1), "stage_to_rank_map": {1: (0, 3), 0: [2, 1]}}, str)
    assert stages.ranks == ((2, 1), (0, 3)) and stages.stage_of(3) == 1


@pytest.mark.parametrize(("depth", "layers"), [(4, 24), (5, 24), (7, 12), (3, 3)])
def test_no_layer_is_lost(read, depth, layers):
    cut = read(driver_conf(depth, 1)).layers(layers)
    assert [layer for stage in cut for layer in stage] == list(range(layers))
    assert max(map(len, cut)) - min(map(len, cut)) == (layers % depth > 0)


def changed(**entries):
    return {key: value for key, value in (TWO | entries).items() if value is not None}


@pytest.mark.parametrize(
    ("conf", "expected"),
    [
        ("{'module_to_stage_map': [0,", r"conf.json:1: neither JSON nor a dictionary"),
        ("{'module_to_stage_map': list(range(3))}", "neither JSON nor a dictionary"),
        ("[0, 1]", "a list instead of a dictionary"),
        (changed(module_to_stage_map=None), "module_to_stage_map is missing"),
        (changed(stage_to_rank_map=None), "stage_to_rank_map is missing"),
        (changed(stages=2), "'stages' is unknown: known are module_to_stage_map"),
        (changed(module_to_stage_map=2), "module_to_stage_map 2: give the stage of each module"),
        (changed(module_to_stage_map=[0]), r"module_to_stage_map \[0\]: give the stage of each module"),
        (changed(module_to_stage_map=[1, 1, 1]), r"module_to_stage_map\[0\] is stage 1: begin with stage 0"),
        (changed(module_to_stage_map=[0, 2, 2]), r"module_to_stage_map\[1\] is stage 2: give 0 or 1"),
        (changed(module_to_stage_map=[0, 1, 0, 0]), r"module_to_stage_map\[2\] is stage 0: give 1 or 2"),
        (changed(module_to_stage_map=[0, -1, 0]), r"module_to_stage_map\[1\] -1: give a whole number"),
        (changed(module_to_stage_map=[0, True, 1]), r"module_to_stage_map\[1\] True: give a whole number"),
        (changed(module_to_stage_map=[0, "1", 1]), r"module_to_stage_map\[1\] '1': give a whole number"),
        (changed(module_to_stage_map=[0, 0, 1]), r"module_to_stage_map\[2\], the loss, is stage 1: put it on stage 0"),
        (changed(stage_to_rank_map=[[0], [1]]), r"stage_to_rank_map \[\[0\], \[1\]\]: give a dictionary by stage"),
        (changed(stage_to_rank_map={"0": [0]}), r"stage_to_rank_map\['1'\] is missing"),
        (changed(stage_to_rank_map={"0": [0], "1": [1], "2": [2]}), r"stage_to_rank_map\['2'\] is no stage"),
        (changed(stage_to_rank_map={"0": [0], "1": []}), r"stage_to_rank_map\['1'\] \[\]: give the ranks"),
        (changed(stage_to_rank_map={"0": [0], "1": 1}), r"stage_to_rank_map\['1'\] 1: give the ranks"),
        (changed(stage_to_rank_map={"0": [0], "1": [1.5]}), r"stage_to_rank_map\['1'\] 1.5: give a whole number"),
        (changed(stage_to_rank_map={"0": [0, 1], "1": [1]}), r"stage_to_rank_map\['1'\] has rank 1 of stage 0"),
        (changed(stage_to_rank_map={"0": [0], "1": [2]}), "stage_to_rank_map leaves out rank 1: 2 ranks are 0 to 1"),
        (changed(stage_to_depth_map={"0": 1}), r"stage_to_depth_map\['1'\] is missing"),
        (changed(stage_to_depth_map={"0": -1, "1": 0}), r"stage_to_depth_map\['0'\] -1: give a whole number"),
    ],
)
def test_a_wrong_entry_is_named(read, conf, expected):
    with pytest.raises(UserError, match=expected) as caught:
        read(conf)
    assert "conf.json" in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_run_must_agree_with(read, tmp_path):
    stages = read(TWO)
    with pytest.raises(UserError, match="names 2 processes, the launcher has 3: give --num_processes 2"):
        stages.check_processes(3)
    with pytest.raises(UserError, match="module_to_stage_map has 2 modules before the loss, the model 1 layers"):
        stages.layers(1)
    with pytest.raises(UserError, match="absent.json cannot be read"):
        read_stage_map(tmp_path / "absent.json")
    (tmp_path / "packed.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="packed.json cannot be read"):
        read_stage_map(tmp_path / "packed.json")
