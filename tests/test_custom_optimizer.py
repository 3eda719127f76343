"""docs/custom_optimizer.md, as it stands: its file, alone and under strategies that cut tensors."""

import re

import pytest

from harness import REPOSITORY
from pretraining import fp32_copy, losses, small_run

PAGE = REPOSITORY / "docs" / "custom_optimizer.md"
WHOLE = 'p.sub_(group["lr"] * state["momentum"] / state["momentum"].norm())'


@pytest.fixture
def own_file(tmp_path):
    """A function of a change to the page's file, giving its path."""

    def write(change=lambda text: text):
        (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
        (tmp_path / "mine.py").write_text(change(code))
        return tmp_path / "mine.py"

    return write


def run(path, corpus, cache, out, *flags):
    own = ["--optimizer_type", f"{path}:SignDescent", "--optimizer_args", "momentum=0.95"]
    own += ["--lr_scheduler_type", f"{path}:stairs", "--learning_rate", 1e-3]
    return small_run(corpus, cache, out, *own, *flags, steps=8)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_the_pages_file_trains_under_a_yaml_as_alone(harness, own_file, tiny_corpus, cache, tmp_path, name):
    path = own_file()
    harness.run(*run(path, tiny_corpus, cache, tmp_path / "alone")).check()
    config = fp32_copy(f"accelerate_configs/{name}.yaml", tmp_path)
    words = run(path, tiny_corpus, cache, tmp_path / "cut", "--per_device_train_batch_size", 4)
    for rank in harness.launch(*words, config=config, num_processes=None):
        rank.check()
    alone, cut = losses(tmp_path / "alone"), losses(tmp_path / "cut")
    assert len(alone) == 8 and cut == pytest.approx(alone, abs=2e-3)  # a sign turns where a gradient is nearly 0


def test_one_that_looks_at_whole_matrices_is_refused_where_they_are_cut(
    harness, own_file, tiny_corpus, cache, tmp_path
):
    path = own_file(lambda text: text.replace('p.sub_(group["lr"] * state["momentum"].sign())', WHOLE))
    assert "norm()" in path.read_text()
    words = run(path, tiny_corpus, cache, tmp_path / "run", "--per_device_train_batch_size", 4)
    config = fp32_copy("accelerate_configs/zero2.yaml", tmp_path)
    ranks = harness.launch(*words, config=config, num_processes=None)
    assert {rank.returncode for rank in ranks} == {2}
    assert any("SignDescent" in rank.stderr and "whole" in rank.stderr for rank in ranks)
