"""The picture of a validation split."""

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix

from common.data.glue import TASKS, Task
from common.eval_plot import confusion, write_eval_plot


def test_confusion_is_scikit_learns():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 3, 200), rng.integers(0, 2, 200)
    assert (confusion(predictions, labels, 4) == confusion_matrix(labels, predictions, labels=range(4))).all()


@pytest.mark.parametrize("task", [TASKS["mnli"], TASKS["stsb"]], ids=["confusion", "scatter"])
def test_what_is_drawn_depends_on_the_predictions(tmp_path, task):
    labels = np.arange(30) % 3 if task.labels else np.linspace(0, 5, 30, dtype=np.float32)
    right = np.eye(3, dtype=np.float32)[labels] if task.labels else labels[:, None]
    for name, outputs in (("right", right), ("again", right), ("wrong", right[::-1])):
        write_eval_plot(tmp_path / f"{name}.png", task, outputs, labels, "a title", "eval_x 1")
    right, again, wrong = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("right", "again", "wrong"))
    assert (right == again).all() and right.shape == wrong.shape and (right != wrong).any()
    assert len(list(tmp_path.iterdir())) == 3  # nothing half-written is left


def test_many_classes_and_classes_that_do_not_occur(tmp_path):
    task = Task("own", "", ("text",), "label", tuple(f"class {number}" for number in range(20)), ("accuracy",))
    write_eval_plot(tmp_path / "a.png", task, np.eye(20, dtype=np.float32)[:5], np.arange(5), "own", "")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (780, 660)
