"""The zip for gluebenchmark.com: made of the predictions of runs, and judged."""

import json
import zipfile

import numpy as np
import pytest

from common.data.glue import TASKS
from common.errors import UserError
from common.glue.submission import check_submission, make_submission
from harness import REPOSITORY

# gluebenchmark.com: the files of its sample submission, their rows, and what they may answer.
NLI = {"entailment", "neutral", "contradiction"}
PAIR = {"entailment", "not_entailment"}
ZERO_ONE = {"0", "1"}
WANTED = {
    "CoLA.tsv": ("cola", "", 1063, ZERO_ONE),
    "SST-2.tsv": ("sst2", "", 1821, ZERO_ONE),
    "MRPC.tsv": ("mrpc", "", 1725, ZERO_ONE),
    "STS-B.tsv": ("stsb", "", 1379, None),
    "QQP.tsv": ("qqp", "", 390965, ZERO_ONE),
    "MNLI-m.tsv": ("mnli", "", 9796, NLI),
    "MNLI-mm.tsv": ("mnli", "_mm", 9847, NLI),
    "QNLI.tsv": ("qnli", "", 5463, PAIR),
    "RTE.tsv": ("rte", "", 3000, PAIR),
    "WNLI.tsv": ("wnli", "", 146, ZERO_ONE),
    "AX.tsv": ("mnli", "_ax", 1104, NLI),
}


@pytest.fixture(scope="module")
def predictions():
    """{zip's file: answers by index}, as models would give them."""
    rng = np.random.default_rng(0)
    return {
        name: rng.choice(sorted(labels), rows).tolist()
        if labels
        else [f"{score:.9g}" for score in np.float32(rng.normal(2.5, 2.5, rows))]
        for name, (_, _, rows, labels) in WANTED.items()
    }


def write_run(folder, task):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "all_results.json").write_text(json.dumps({"task": task}))


@pytest.fixture(scope="module")
def runs(predictions, tmp_path_factory):
    """A folder of runs with predictions of every task, in whatever order of rows."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(1)
    for name, (task, suffix, rows, _) in WANTED.items():
        write_run(folder / task, task)
        lines = [f"{index}\t{predictions[name][index]}\n" for index in rng.permutation(rows)]
        (folder / task / f"predict_results{suffix}.tsv").write_text("index\tprediction\n" + "".join(lines))
    return folder


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """The zip of these runs."""
    path = tmp_path_factory.mktemp("zip") / "glue.zip"
    make_submission(runs, path)
    return path


def contents(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def test_the_zip_is_what_the_server_wants(whole, predictions):
    found = contents(whole)
    assert found.keys() == WANTED.keys()
    for name, (_, _, rows, labels) in WANTED.items():
        header, *lines = found[name].removesuffix("\n").split("\n")
        assert header == "index\tprediction"
        index, answers = zip(*(line.split("\t") for line in lines), strict=True)
        assert index == tuple(map(str, range(rows)))
        if labels:
            assert list(answers) == predictions[name]
        else:
            cut = np.clip(np.array(predictions[name], float), 0, 5)
            assert np.array(answers, float) == pytest.approx(cut, abs=5.1e-4)
            assert {"0.000", "5.000"} < set(answers) and all(len(answer) == 5 for answer in answers)


def test_equal_predictions_make_equal_zips(runs, whole, tmp_path):
    make_submission(runs, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == whole.read_bytes()


def test_the_best_runs_of_a_sweep(runs, whole, tmp_path):
    chosen = {}
    for task in TASKS:
        chosen[task] = f"{task}/lr4e-05-seed1"
        (tmp_path / task).mkdir()
        (tmp_path / chosen[task]).symlink_to(runs / task)
    (tmp_path / "selected.json").write_text(json.dumps(chosen))
    make_submission(tmp_path, tmp_path / "glue.zip")
    assert (tmp_path / "glue.zip").read_bytes() == whole.read_bytes()
    (tmp_path / "selected.json").write_text(json.dumps(chosen | {"rte": "rte/lr9-seed9"}))
    with pytest.raises(UserError, match="selected.json: .*rte/lr9-seed9 is no folder"):
        make_submission(tmp_path, tmp_path / "glue.zip")
    (tmp_path / "selected.json").write_text("[")
    with pytest.raises(UserError, match="selected.json: not a JSON object"):
        make_submission(tmp_path, tmp_path / "glue.zip")


def test_a_run_of_the_diagnostic_set_alone(runs, whole, tmp_path):
    write_run(tmp_path / "diagnostic", "ax")
    (tmp_path / "diagnostic" / "predict_results.tsv").symlink_to(runs / "mnli" / "predict_results_ax.tsv")
    make_submission(tmp_path, tmp_path / "glue.zip", fill_missing=True)
    assert contents(tmp_path / "glue.zip")["AX.tsv"] == contents(whole)["AX.tsv"]


def test_tasks_without_a_run(runs, tmp_path, capsys):
    for task in set(TASKS) - {"cola", "stsb", "mnli"}:
        (tmp_path / task).symlink_to(runs / task)
    path = tmp_path / "glue.zip"
    with pytest.raises(UserError, match="no predictions for CoLA, STS-B, MNLI-m, MNLI-mm, AX: .*--fill_missing"):
        make_submission(tmp_path, path)
    assert not path.exists()
    make_submission(tmp_path, path, fill_missing=True)
    check_submission(path)
    assert "CoLA, STS-B, MNLI-m, MNLI-mm, AX" in capsys.readouterr().out
    found = contents(path)
    assert {line.split("\t")[1] for line in found["MNLI-mm.tsv"].splitlines()[1:]} == {"entailment"}
    scores = [float(line.split("\t")[1]) for line in found["STS-B.tsv"].splitlines()[1:]]
    assert scores[0] == 0 and scores[-1] == 5 and np.ptp(scores) > 0  # its correlation is defined


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["0\t0"], "has 1 rows instead of 146"),
        ([f"{number}\t0" for number in range(7, 153)], "index '146' is none of 0 to 145"),  # another file's
        ([f"{number % 145}\t0" for number in range(146)], "index '0' is there for the second time"),
        ([f"{number}\tmaybe" for number in range(146)], "'maybe' is none of 0, 1"),
        (["0"], "not a table of index and prediction"),
    ],
)
def test_predictions_that_do_not_fit_are_named(tmp_path, lines, message):
    write_run(tmp_path / "wnli", "wnli")
    path = tmp_path / "wnli" / "predict_results.tsv"
    path.write_text("".join(f"{line}\n" for line in ("index\tprediction", *lines)))
    with pytest.raises(UserError, match=f"wnli/predict_results.tsv.*{message}.*do_predict"):
        make_submission(tmp_path, tmp_path / "glue.zip", fill_missing=True)
    assert not list(tmp_path.glob("glue.zip*"))


def test_folders_that_hold_no_runs_or_two_of_a_task(runs, tmp_path):
    with pytest.raises(UserError, match="absent: no such folder"):
        make_submission(tmp_path / "absent", tmp_path / "glue.zip")
    with pytest.raises(UserError, match="holds no runs of run_glue.py"):
        make_submission(tmp_path, tmp_path / "glue.zip")
    make_submission(tmp_path, tmp_path / "empty.zip", fill_missing=True)
    check_submission(tmp_path / "empty.zip")
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(runs / "rte")
    with pytest.raises(UserError, match="a and .*b are both runs of rte: keep one, or name it in selected.json"):
        make_submission(tmp_path, tmp_path / "glue.zip")


def without_a_file(files):
    del files["QNLI.tsv"]


def with_another_file(files):
    files["glue/RTE.tsv"] = files["RTE.tsv"]


def replaced(name, old, new):
    def damage(files):
        assert old in files[name]
        files[name] = files[name].replace(old, new, 1)

    return damage


def without_the_last_row(files):
    files["QQP.tsv"] = files["QQP.tsv"].removesuffix("\n").rpartition("\n")[0] + "\n"


def with_another_answer(files):
    files["RTE.tsv"] = files["RTE.tsv"].replace("\tentailment", "\tneutral")


DAMAGE = {
    "a file is missing": (without_a_file, "QNLI.tsv is missing"),
    "a file too many": (with_another_file, "glue/RTE.tsv does not belong there"),
    "another header": (replaced("AX.tsv", "index\tprediction", "id\tlabel"), "AX.tsv does not begin with the header"),
    "a row is missing": (without_the_last_row, "QQP.tsv has 390,964 rows instead of 390,965"),
    "an index twice": (replaced("CoLA.tsv", "\n7\t", "\n6\t"), "CoLA.tsv line 9: index '6' is there for the second"),
    "an index too large": (
        replaced("CoLA.tsv", "\n7\t", "\n1063\t"),
        "CoLA.tsv line 9: index '1063' is none of 0 to 1,062",
    ),
    "an index that is none": (
        replaced("MRPC.tsv", "\n7\t", "\n07\t"),
        "MRPC.tsv line 9: index '07' is none of 0 to 1,724",
    ),
    "another task's answer": (with_another_answer, "'neutral' is none of entailment, not_entailment"),
    "a column too few": (replaced("WNLI.tsv", "\n3\t", "\n3 "), "WNLI.tsv line 5 has one column instead of two"),
    "a column too many": (replaced("WNLI.tsv", "\n3\t", "\n3\tx\t"), r"WNLI.tsv line 5: 'x\\t\d' is none of 0, 1"),
    "a score out of range": (replaced("STS-B.tsv", "\t0.000", "\t5.001"), "'5.001' is not a score from 0 to 5"),
    "a score that is none": (replaced("STS-B.tsv", "\t0.000", "\tnan"), "'nan' is not a score from 0 to 5"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_zip_is_refused(whole, tmp_path, name):
    damage, message = DAMAGE[name]
    files = contents(whole)
    damage(files)
    path = tmp_path / "damaged.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    with pytest.raises(UserError, match=f"damaged.zip: .*{message}"):
        check_submission(path)


def test_a_cut_a_changed_and_an_absent_zip(whole, tmp_path):
    content = whole.read_bytes()
    middle = len(content) // 2
    for name, damaged in (
        ("cut", content[:middle]),
        ("changed", content[:middle] + bytes(100) + content[middle + 100 :]),
        ("empty", b""),
    ):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UserError, match=f"{name}: not a whole zip"):
            check_submission(tmp_path / name)
    with pytest.raises(UserError, match="absent: not a whole zip .*No such file"):
        check_submission(tmp_path / "absent")


def test_scores_that_are_no_number_are_not_cut_into_one(runs, tmp_path):
    write_run(tmp_path / "stsb", "stsb")
    lines = (runs / "stsb" / "predict_results.tsv").read_text().splitlines()
    lines[1] = lines[1].partition("\t")[0] + "\tnan"
    (tmp_path / "stsb" / "predict_results.tsv").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="'nan' is not a score from 0 to 5"):
        make_submission(tmp_path, tmp_path / "glue.zip", fill_missing=True)


@pytest.mark.slow
def test_the_command(harness, runs, whole, tmp_path):
    """As a user calls it, from another folder, with relative paths."""
    (tmp_path / "sweep").symlink_to(runs)
    script = ["bash", REPOSITORY / "scripts" / "make_glue_submission.sh"]
    done = harness.command(*script, "sweep", "mine.zip", cwd=tmp_path).check()
    assert "mine.zip: checked, ready" in done.stdout and (tmp_path / "mine.zip").read_bytes() == whole.read_bytes()
    assert "fit to hand in" in harness.command(*script, "--check", "mine.zip", cwd=tmp_path).check().stdout
    (tmp_path / "mine.zip").write_bytes(whole.read_bytes()[:-200])
    for words, message in ((["--check", "mine.zip"], "mine.zip: not a whole zip"), ([], "give a folder of runs")):
        done = harness.command(*script, *words, cwd=tmp_path).check(2)
        assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
