"""The metrics file, the curves, the model card, the summary, and the progress bar."""

import io
import json
import math
import re
import sys

import pytest
from huggingface_hub import ModelCard
from matplotlib.image import imread

from common.errors import UserError
from common.progress import Progress, format_count, format_duration
from common.report import (
    FillMaskExample,
    MetricsLog,
    format_summary,
    perplexity,
    read_metrics,
    write_all_results,
    write_curves,
    write_model_card,
)

RESULTS = {
    "eval_loss": 3.5512,
    "eval_accuracy": 0.3123,
    "unigram_loss": 6.81,
    "unigram_accuracy": 0.0561,
    "train_steps": 1500,
    "train_tokens": 12_288_000,
    "train_runtime": 300.3,
    "tokens_per_second": 41_021.0,
    "mfu": 0.341,
}
EXAMPLES = [
    FillMaskExample("Return the <mask> of\n  the | value.", "size", [("size", 0.61), ("sign", 0.2), ("set", 0.05)]),
    FillMaskExample(" ".join(["word"] * 60) + " [MASK].", "end", [("end", 0.5), ("word", 0.3), ("mask", 0.1)]),
]


def train_row(step, loss=4.0):
    hours = step / 3600
    row = {"step": step, "hours": hours, "tokens": step * 4096, "loss": loss, "learning_rate": 1e-3}
    return row | {"tokens_per_second": 4e4, "mfu": None}


def test_rows_come_back_as_they_were_written(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", is_main=True)
    rows = [train_row(10), {"step": 10, "eval_loss": 3.9, "note": "größer"}]
    for count, row in enumerate(rows, start=1):
        log.write(row)
        assert read_metrics(log.path) == rows[:count]  # on disk at once


def test_nan_becomes_null(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", is_main=True)
    log.write({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    assert json.loads(log.path.read_text()) == {"step": 1, "loss": None, "grad_norm": None}


def test_other_ranks_write_nothing(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", is_main=False)
    log.write(train_row(1))
    log.truncate_after(0)
    assert not list(tmp_path.iterdir()) and read_metrics(log.path) == []


def test_a_resume_drops_later_rows_and_the_line_that_was_cut_off(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", is_main=True)
    for step in (10, 20, 30):
        log.write(train_row(step))
        log.write({"step": step, "eval_loss": 3.0})
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + b'{"step": 40, "lo')
    assert len(read_metrics(log.path)) == 6
    log.truncate_after(20)
    log.write(train_row(21))
    assert [row["step"] for row in read_metrics(log.path)] == [10, 10, 20, 20, 21]
    log.truncate_after(0)
    assert read_metrics(log.path) == [] and [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_kill_at_any_byte_loses_only_the_last_row(tmp_path, cut):
    log = MetricsLog(tmp_path / "metrics.jsonl", is_main=True)
    log.write(train_row(1))
    log.write({"step": 2, "eval_loss": 3.0})  # 30 bytes with its newline
    log.path.write_bytes(log.path.read_bytes()[:-cut])
    assert read_metrics(log.path) == [train_row(1)]


def test_a_malformed_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def colored_pixels(path, color):
    """How many pixels of a picture have nearly this "#rrggbb"."""
    target = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return int((abs(imread(path)[:, :, :3] - target).max(axis=2) < 0.02).sum())


@pytest.mark.parametrize("count", [0, 1, 60])
def test_curves_of_any_length(tmp_path, count):
    rows = [train_row(10 * i, loss=9 - i / 20) for i in range(1, count + 1)]
    rows += [{"step": 10 * i, "hours": i / 360, "tokens": 40960 * i, "eval_loss": 6.0} for i in range(20, count, 20)]
    path = tmp_path / "curves.png"
    write_curves(rows, path, "a run", baseline_loss=7.0 if count else None)
    height, width = imread(path).shape[:2]
    assert (width, height) == (1560, 840)
    train, evaluation, baseline = (colored_pixels(path, color) for color in ("#4c72b0", "#c44e52", "#7f7f7f"))
    assert (train > 0, evaluation > 0) == (count > 0, count > 20)
    if count:
        assert baseline > 0
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_curves_of_a_run_that_only_diverged(tmp_path):
    write_curves([train_row(1) | {"loss": None}], tmp_path / "curves.png", "a run")
    assert colored_pixels(tmp_path / "curves.png", "#4c72b0") == 0


def test_the_perplexity_of_any_loss():
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1000.0) == math.inf


def test_all_results_are_json(tmp_path):
    path = tmp_path / "all_results.json"
    write_all_results(path, RESULTS | {"peak": math.inf, "nested": {"values": [1, math.nan]}})
    read = json.loads(path.read_text())
    assert read["eval_loss"] == 3.5512 and read["peak"] is None and read["nested"] == {"values": [1, None]}
    assert [file.name for file in tmp_path.iterdir()] == ["all_results.json"]


def test_model_card_is_valid_for_the_hub(tmp_path):
    command = "bash scripts/run_pretraining.sh accelerate_configs/ddp.yaml 0.1"
    write_model_card(
        tmp_path / "README.md",
        title="BERT small",
        command=command,
        facts={"Data": {"source": "a | b <c>", "tokens": "12 M"}, "Model": {"layers": "4"}},
        results=RESULTS,
        examples=EXAMPLES,
        licence_note="As the sources.",
        tags=["bert", "fill-mask"],
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "fill-mask"
    assert card.data.tags == ["fill-mask", "bert"]
    text = card.text
    assert f"```bash\n{command}\n```" in text and "](curves.png)" in text
    assert "| loss (nats) | 3.551 | 6.810 |" in text and "| accuracy | 31.2% | 5.6% |" in text
    assert "| source | a \\| b &lt;c> |" in text and "## Model" in text and "As the sources." in text
    # The answers hold any text, so every line of them must stay inside an indented code block.
    answers = text[text.index("Answers on held-out text:") : text.index("## Use")].splitlines()[1:]
    assert "<mask> of the | value." in "\n".join(answers)
    assert all(line.startswith("    ") for line in answers if line)
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    compile(snippet, "snippet", "exec")


def summary(results, **changes):
    settings = {
        "examples": EXAMPLES,
        "files": {"curves": "runs/one/curves.png"},
        "model_folder": "runs/one",
        "mfu_formula": "tokens/s x 6 x 3.2M parameters / 0.5 TFLOP/s",
    }
    return format_summary(results, **(settings | changes))


def test_summary_says_everything_and_fits_the_screen():
    text = summary(RESULTS | {"epoch": 1.5, "peak_memory_bytes": 3 * 2**29})
    assert max(len(line) for line in text.splitlines()) <= 100
    for part in (
        "1,500 steps, 12.3M tokens in 5:00, 1.5 epochs",
        "41k real tokens/s (padding not counted), peak memory 1.50 GiB",
        "34.1% = tokens/s x 6 x 3.2M parameters / 0.5 TFLOP/s",
        "Return the <mask> of the | value.",
        "-> size 61%   sign 20%   set 5%   (was: size)",
        "runs/one/curves.png",
        'pipeline("fill-mask", model="runs/one")',
    ):
        assert part in text
    header, loss, accuracy = text.splitlines()[1:4]
    assert len(header) == len(loss) == len(accuracy)  # the columns end at the same place
    assert loss.split() == ["loss", "(nats)", "3.551", "6.810"] and accuracy.split() == ["accuracy", "31.2%", "5.6%"]


def test_summary_without_what_may_be_unknown():
    unknown = {"mfu": None, "tokens_per_second": None}
    text = summary(RESULTS | unknown, examples=[], mfu_formula="no peak FLOP/s known for this device")
    assert "speed         not known" in text
    assert "not known: no peak FLOP/s known for this device" in text
    assert "epochs" not in text and "peak memory" not in text and "answers" not in text


class FakeTime:
    seconds = 0.0

    def __call__(self):
        return self.seconds


def updates(progress, now, times):
    for step, seconds in enumerate(times, start=1):
        now.seconds = seconds
        progress.update(seconds / 300, seconds, 300 - seconds, step, 4.8123, 21_340.0)


def test_a_log_file_gets_a_line_every_ten_seconds_and_the_last_one(capsys):
    now = FakeTime()
    progress = Progress(True, "pretraining", now=now)
    updates(progress, now, range(1, 26))
    progress.note("saved")
    progress.close()
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "pretraining   0%  0:01<4:59, step 1, loss 4.81, 21.3k tokens/s",
        "pretraining   4%  0:11<4:49, step 11, loss 4.81, 21.3k tokens/s",
        "pretraining   7%  0:21<4:39, step 21, loss 4.81, 21.3k tokens/s",
        "pretraining   8%  0:25<4:35, step 25, loss 4.81, 21.3k tokens/s",
    ]
    assert captured.out == "saved\n"


def test_the_last_line_is_not_repeated(capsys):
    now = FakeTime()
    progress = Progress(True, "pretraining", now=now)
    updates(progress, now, [1])
    progress.close()
    assert len(capsys.readouterr().err.splitlines()) == 1


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_that_notes_do_not_break(capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    now = FakeTime()
    progress = Progress(True, "pretraining", now=now)
    progress.note("before the bar")
    updates(progress, now, [30, 126])
    progress.note("saved a checkpoint")
    progress.update(0.5, 150, None, 1234, math.nan, None)
    progress.close()
    assert capsys.readouterr().out == "before the bar\nsaved a checkpoint\n"
    drawn = [line.rstrip() for line in terminal.getvalue().split("\r") if line.strip()]
    assert re.fullmatch(r"pretraining  10% \|.*\| 0:30<4:30, step 1, loss 4.81, 21.3k tokens/s", drawn[0])
    assert any(re.fullmatch(r"pretraining  42% \|█+.*\| 2:06<2:54, step 2, loss .*", line) for line in drawn)
    assert re.fullmatch(r"pretraining  50% \|█+.*\| 2:30<\?, step 1,234", drawn[-1])
    assert terminal.getvalue().endswith("\n")


def test_other_ranks_show_nothing(capsys):
    progress = Progress(False, "pretraining")
    progress.update(0.5, 1, 1, 1, 1.0, 1.0)
    progress.note("hello")
    progress.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00"), (125.4, "2:05"), (59.6, "1:00"), (3725, "1:02:05"), (-3, "0:00")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    "number, text", [(7, "7"), (999.4, "999"), (999.9, "1k"), (21_340, "21.3k"), (999_960, "1M"), (4.5e6, "4.5M")]
)
def test_counts(number, text):
    assert format_count(number) == text
