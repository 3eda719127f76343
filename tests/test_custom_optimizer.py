"""docs/custom_optimizer.md, as it stands: its file, alone and under strategies that cut tensors."""

import re
from functools import partial

import pytest

from harness import REPOSITORY
from pretraining import fp32_copy, losses, results, small_run

PAGE = REPOSITORY / "docs" / "custom_optimizer.md"
UPDATE = 'p.sub_(group["lr"] * (state["momentum"] / group["scale"]).tanh())'
WHOLE = 'p.sub_(group["lr"] * state["momentum"] / state["momentum"].norm())'


def write_own(folder, old="", new=""):
    """The page's file with a change. Returns: its Path."""
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    assert old in code and len(code.strip().splitlines()) <= 30
    (folder / "mine.py").write_text(code.replace(old, new) if old else code)
    return folder / "mine.py"


@pytest.fixture
def own_file(tmp_path):
    """A function of a change to the page's file, giving its path."""
    return partial(write_own, tmp_path)


@pytest.fixture(scope="module")
def run_alone(harness, tiny_corpus, cache, tmp_path_factory):
    """The folder of a run with the page's file as it is, on one process."""
    folder = tmp_path_factory.mktemp("alone")
    harness.run(*run(write_own(folder), tiny_corpus, cache, folder / "run")).check()
    return folder / "run"


def run(path, corpus, cache, out, *flags):
    own = ["--optimizer_type", f"{path}:TanhDescent", "--optimizer_args", "momentum=0.95"]
    own += ["--lr_scheduler_type", f"{path}:stairs", "--learning_rate", 5e-3, "--init_output_bias", "zeros"]
    return small_run(corpus, cache, out, *own, *flags, steps=20)


def launched(harness, name, tmp_path, words):
    """What the ranks of a YAML in fp32 did."""
    config = fp32_copy(f"accelerate_configs/{name}.yaml", tmp_path)
    return harness.launch(*words, "--per_device_train_batch_size", 4, config=config, num_processes=None)


@pytest.mark.parametrize(
    "name", ["ddp", "fsdp", *(pytest.param(one, marks=pytest.mark.exhaustive) for one in ("zero2", "zero3"))]
)
def test_the_pages_file_trains_under_a_yaml_as_alone(harness, run_alone, own_file, tiny_corpus, cache, tmp_path, name):
    for rank in launched(harness, name, tmp_path, run(own_file(), tiny_corpus, cache, tmp_path / "cut")):
        rank.check()
    alone, cut = losses(run_alone), losses(tmp_path / "cut")
    assert len(alone) == 20 and results(tmp_path / "cut")["world_size"] == 2
    assert sum(alone[step] for step in range(16, 21)) < sum(alone[step] for step in range(1, 6)) - 0.5
    assert cut == pytest.approx(alone, abs=1e-5)


def test_one_that_looks_at_whole_matrices_trains_under_ddp(harness, own_file, tiny_corpus, cache, tmp_path):
    path = own_file(UPDATE, WHOLE)
    harness.run(*run(path, tiny_corpus, cache, tmp_path / "alone")).check()
    for rank in launched(harness, "ddp", tmp_path, run(path, tiny_corpus, cache, tmp_path / "run")):
        rank.check()
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp"])
def test_one_that_looks_at_whole_matrices_is_refused(harness, own_file, tiny_corpus, cache, tmp_path, name):
    path = own_file(UPDATE, WHOLE)
    ranks = launched(harness, name, tmp_path, run(path, tiny_corpus, cache, tmp_path / "run"))
    assert {rank.returncode for rank in ranks} == {2}
    said = "TanhDescent looks at whole tensors and would be given parts of them: give --optimizer_type adamw"
    assert sum(said in rank.stderr for rank in ranks) == 1
    assert not any("Traceback" in rank.stderr for rank in ranks)
