"""Scripts around run_glue.py: which runs they start, the table of them, and the download of GLUE's files."""

import hashlib
import http.server
import json
import shutil
import threading
import zipfile

import pytest

from common.data.glue import TASKS, read_task_file
from common.errors import UserError
from common.models.families import FAMILIES
from common.seed_table import make_table, read_runs
from harness import REPOSITORY
from pretraining import results, small_run
from stub_shell import Shell, flag


def launches(calls):
    return [call for call in calls if "accelerate.commands.launch" in call["argv"]]


def pretrained(folder, kind="BertForMaskedLM", finished=True):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": [kind]}))
    if finished:
        (folder / "all_results.json").write_text("{}")


# ---- run_finetune_glue.sh ------------------------------------------------------------------------


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path, "run_finetune_glue.sh")


def test_without_arguments_the_newest_pretraining_is_compared_with_random_weights(shell):
    for name in ("1", "2"):
        pretrained(shell.here / "runs" / name)
    pretrained(shell.here / "runs" / "3", kind="BertForSequenceClassification")
    pretrained(shell.here / "runs" / "4", finished=False)
    calls = shell.run()
    assert ["common.data.follows", "common.seed_table"] == [call["argv"][1] for call in (calls[0], calls[-1])]
    assert "--check_arguments" in calls[1]["argv"] and len(launches(calls)) == len(calls) - 3 == 6
    seeds = [(flag(call, "--seed"), "--random_weights" in call["argv"]) for call in launches(calls)]
    assert seeds == [(seed, random) for seed in ("42", "43", "44") for random in (False, True)]
    for call in launches(calls):
        assert flag(call, "--model_name_or_path") == "runs/2" and flag(call, "--train_file") == "/train.tsv"
        weights = "random" if "--random_weights" in call["argv"] else "pretrained"
        assert flag(call, "--output_dir") == f"{calls[-1]['argv'][2]}/{weights}-seed{flag(call, '--seed')}"


def test_the_newest_pretraining_may_have_any_objective(shell):
    """All classes that run_pretraining.py saves, and none that other scripts save."""
    classes = {kind.__name__ for family in FAMILIES.values() for kind in (family.model, family.pairs) if kind}
    assert {"ElectraForPreTraining", "MegatronBertForPreTraining", "ModernBertForMaskedLM"} < classes
    for number, kind in enumerate(sorted(classes), start=1):
        pretrained(shell.here / "runs" / f"{number:02}", kind=kind)
        for other in ("OPTForCausalLM", "BertForSequenceClassification"):
            pretrained(shell.here / "runs" / f"{number:02}-{other}", kind=other)
        call, *_ = launches(shell.run(FRUGAL_SEEDS="7"))
        assert flag(call, "--model_name_or_path") == f"runs/{number:02}", kind


def test_with_data_the_recipe_is_that_of_mrpc(shell):
    calls = launches(shell.run("ddp", "my model", "", "my data", "--fp32", FRUGAL_SEEDS="7"))
    assert len(calls) == 2
    for call in calls:
        wanted = {"--task_name": "mrpc", "--data_dir": "my data", "--model_name_or_path": "my model", "--seed": "7"}
        wanted |= {"--train_batch_size": "128", "--num_train_epochs": "3", "--learning_rate": "2.4e-5"}
        assert {name: flag(call, name) for name in wanted} == wanted and "--fp32" in call["argv"]
        assert flag(call, "--config_file").endswith("/ddp.yaml")
    assert flag(launches(shell.run("cpu", "m", "rte", "data"))[0], "--task_name") == "rte"


def test_runs_in_a_named_folder_are_continued(shell):
    pretrained(shell.here / "model")
    calls = launches(shell.run("cpu", "model", FRUGAL_SEEDS="7", FRUGAL_OUTPUT="my runs"))
    assert [flag(call, "--output_dir") for call in calls] == ["my runs/pretrained-seed7", "my runs/random-seed7"]
    assert {flag(call, "--resume_from_checkpoint") for call in calls} == {"latest"}
    assert "--resume_from_checkpoint" not in launches(shell.run("cpu", "model", FRUGAL_SEEDS="7"))[0]["argv"]


def test_what_is_missing_is_said_in_one_line(shell):
    said = shell.fail()
    assert "bash scripts/run_pretraining.sh first" in said and said.count("\n") == 1
    said = shell.fail("cpu", "model", "rte")
    assert "scripts/download_finetune_dataset.sh rte" in said and said.count("\n") == 1
    assert "too many arguments: five" in shell.fail("cpu", "model", "rte", "data", "five")
    assert "'nowhere'" in shell.fail("nowhere", "model")
    shell.fail("cpu", "model", "rte", "data", STUB_EXIT="2")


@pytest.mark.exhaustive
def test_the_comparison_from_end_to_end(harness, tiny_corpus, cache, tmp_path):
    """Real runs, on a small table of one's own flags: the last line of the screen is the table."""
    harness.run(*small_run(tiny_corpus, cache, tmp_path / "runs" / "one", steps=2)).check()
    flags = ["--max_train_samples", 64, "--max_eval_samples", 64, "--fp32", "--num_train_epochs", 1]
    words = ["bash", REPOSITORY / "scripts" / "run_finetune_glue.sh", "cpu", *flags]
    done = harness.command(*words, cwd=tmp_path, env={"FRUGAL_SEEDS": "3"}, timeout=600).check()
    (out,) = (tmp_path / "runs").glob("finetune-*")
    rows = [line.split() for line in done.stdout.splitlines()[-7:]]
    assert rows[0] == ["metric", "weights", "seed", "3", "median"]
    accuracy = {row[1]: row[2] for row in rows if row[0] == "eval_accuracy"}
    for weights in ("pretrained", "random"):
        assert accuracy[weights] == f"{results(out / f'{weights}-seed3')['eval_accuracy']:.4f}"


# ---- finetune_bert_mnli.sh -----------------------------------------------------------------------


def test_mnli_by_megatrons_recipe_continues_where_it_stopped(tmp_path):
    shell = Shell(tmp_path, "finetune_bert_mnli.sh")
    pretrained(shell.here / "a model")
    calls = launches(shell.run("a model", "data"))
    assert [flag(call, "--seed") for call in calls] == ["1234", "1235", "1236", "1237", "1238"]
    wanted = {"--train_batch_size": "128", "--learning_rate": "1e-5", "--num_train_epochs": "10"}
    wanted |= {"--warmup_ratio": "0.065", "--weight_decay": "0.1", "--task_name": "mnli", "--data_dir": "data"}
    assert {name: flag(calls[0], name) for name in wanted} == wanted
    done = shell.here / flag(calls[1], "--output_dir")
    done.mkdir(parents=True)
    (done / "all_results.json").write_text("{}")
    again = launches(shell.run("a model", "data", "1234,1235,7", "cpu"))
    assert [flag(call, "--seed") for call in again] == ["1234", "7"]
    assert {flag(call, "--resume_from_checkpoint") for call in again} == {"latest"}
    said = shell.fail("a model", "other data")
    assert "runs/mnli-a model holds runs of another checkpoint or with other flags" in said
    assert "seeds 'x'" in shell.fail("a model", "data", "x") and "give two to four" in shell.fail("a model")


# ---- The table -----------------------------------------------------------------------------------


def run_of(folder, name, **values):
    (folder / name).mkdir()
    facts = {"task": "own", "eval_loss": 1.0, "eval_samples": 9, **values}
    (folder / name / "all_results.json").write_text(json.dumps(facts))


def test_the_table_has_every_seed_the_medians_and_their_difference(tmp_path):
    for seed, right, wrong in ((1, 0.7, 0.5), (2, 0.9, 0.4), (10, 0.6, 0.55)):
        run_of(tmp_path, f"pretrained-seed{seed}", eval_accuracy=right)
        run_of(tmp_path, f"random-seed{seed}", eval_accuracy=wrong)
    assert make_table(read_runs(tmp_path)) == [
        ["metric", "weights", "seed 1", "seed 2", "seed 10", "median"],
        ["eval_accuracy", "pretrained", "0.7000", "0.9000", "0.6000", "0.7000"],
        ["eval_accuracy", "random", "0.5000", "0.4000", "0.5500", "0.5000"],
        ["eval_accuracy", "difference", "+0.2000", "+0.5000", "+0.0500", "+0.2000"],
    ]


def test_runs_that_did_not_finish_have_no_number(tmp_path):
    run_of(tmp_path, "finetuned-seed1", eval_accuracy=0.8, eval_accuracy_mm=0.7)
    (tmp_path / "finetuned-seed2").mkdir()
    assert [row[2:] for row in make_table(read_runs(tmp_path))] == [
        ["seed 1", "median"],
        ["0.8000", "0.8000"],
        ["0.7000", "0.7000"],
    ]
    with pytest.raises(UserError, match="holds no finished run"):
        read_runs(tmp_path / "finetuned-seed2")


# ---- download_finetune_dataset.sh ----------------------------------------------------------------

MRPC_HEADER = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"


class Downloads:
    """A server's files, a copy of the script with their checksums, and the user's folder."""

    def __init__(self, folder, harness):
        self.served, self.repository, self.data = (folder / name for name in ("served", "repository", "my data"))
        self.harness, self.sums = harness, []
        self.scripts = self.repository / "scripts"
        self.scripts.mkdir(parents=True)
        shutil.copy(REPOSITORY / "scripts" / "download_finetune_dataset.sh", self.scripts)
        rte = folder / "RTE.zip"
        with zipfile.ZipFile(rte, "w") as archive:
            for name in ("train", "dev"):
                archive.writestr(f"RTE/{name}.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n")
        self.serve("glue/data/RTE.zip", rte.read_bytes())
        train = [MRPC_HEADER, *(f'{n % 2}\t{n}\t{n + 50}\tfirst {n}\tsecond "{n}' for n in range(10))]
        test = [MRPC_HEADER, *(f"0\t{n}\t{n + 50}\tthird {n}\tfourth {n}" for n in range(20, 24))]
        for name, lines in (("train", train), ("test", test)):
            path = f"senteval/senteval_data/msr_paraphrase_{name}.txt"
            self.serve(path, "".join(f"{line}\r\n" for line in lines).encode())
        self.serve("glue/data/mrpc_dev_ids.tsv", b"3\t53\n8\t58\n")

    def serve(self, path, content):
        """Put a file on the server; its checksum is what the script will know."""
        (self.served / path).parent.mkdir(parents=True, exist_ok=True)
        (self.served / path).write_bytes(content)
        self.sums.append(f"{hashlib.sha256(content).hexdigest()}  {path}\n")
        (self.scripts / "glue.sha256").write_text("".join(self.sums))

    def run(self, *words, url=None, code=0):
        """Run the script. Returns: Result."""
        env = {"FRUGAL_GLUE_URL": url or f"file://{self.served}"}
        return self.harness.command("bash", self.scripts / "download_finetune_dataset.sh", *words, env=env).check(code)


@pytest.fixture
def downloads(tmp_path, harness):
    return Downloads(tmp_path, harness)


def test_mrpc_is_cut_as_glue_cuts_it(downloads):
    said = downloads.run("mrpc", downloads.data).stdout
    assert "MRPC: licence: Microsoft" in said and "verified and unpacked" in said
    folder = downloads.data / "MRPC"
    train, dev = (read_task_file(TASKS["mrpc"], folder / f"{name}.tsv", True) for name in ("train", "dev"))
    kept = [n for n in range(10) if n not in (3, 8)]
    assert [example.texts[0] for example in dev] == ["first 3", "first 8"]
    assert [example.texts for example in train] == [(f"first {n}", f'second "{n}') for n in kept]
    assert [example.label for example in dev] == [1, 0]
    test = read_task_file(TASKS["mrpc"], folder / "test.tsv", False)
    assert [(example.index, example.texts[1]) for example in test] == [(str(n), f"fourth {20 + n}") for n in range(4)]
    assert not list(downloads.data.glob(".*")) and "is left alone" in downloads.run("mrpc", downloads.data).stdout


def test_a_download_goes_on_where_it_stopped(downloads):
    archive = (downloads.served / "glue/data/RTE.zip").read_bytes()
    part = downloads.data / "downloads" / "RTE.zip.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(archive[:100])
    downloads.run("rte", downloads.data)
    assert (downloads.data / "downloads" / "RTE.zip").read_bytes() == archive and not part.exists()
    assert len(read_task_file(TASKS["rte"], downloads.data / "RTE" / "train.tsv", True)) == 1
    # it has indeed kept what was there: what was damaged there is noticed
    shutil.rmtree(downloads.data)
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" + archive[1:100])
    said = downloads.run("rte", downloads.data, code=2).stderr
    assert "its SHA-256 is" in said and not part.exists() and not (downloads.data / "RTE").exists()
    downloads.run("rte", downloads.data)


def test_a_server_that_sends_no_parts_sends_the_whole(downloads):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    def handler(*args):
        return Quiet(*args, directory=str(downloads.served))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        part = downloads.data / "downloads" / "RTE.zip.part"
        part.parent.mkdir(parents=True)
        part.write_bytes(b"begun")
        downloads.run("rte", downloads.data, url=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert (downloads.data / "RTE" / "dev.tsv").exists()


def test_a_changed_file_is_refused(downloads):
    (downloads.served / "glue/data/RTE.zip").write_bytes(b"another archive")
    said = downloads.run("rte", downloads.data, code=2).stderr
    assert "its SHA-256 is" in said and said.count("\n") == 1 and not (downloads.data / "RTE").exists()
    (downloads.data / "downloads" / "RTE.zip").write_bytes(b"copied by hand")
    assert "delete it, or copy it again" in downloads.run("rte", downloads.data, code=2).stderr


def test_without_a_network_it_says_what_goes_where(downloads):
    said = downloads.run("mrpc", downloads.data, url="http://nowhere.invalid", code=2).stderr
    assert said.count("curl: ") == 1  # though it tries a name that is not found again
    assert f"copy them to {downloads.data}/downloads" in said
    assert "https://dl.fbaipublicfiles.com/senteval/senteval_data/msr_paraphrase_test.txt" in said
    for path in downloads.served.rglob("*.t*"):
        shutil.copy(path, downloads.data / "downloads")
    downloads.run("mrpc", downloads.data, url="http://127.0.0.1:9")
    assert (downloads.data / "MRPC" / "dev.tsv").exists()


def test_download_wants_a_known_task_and_a_folder(downloads):
    assert "task 'mrcp' is unknown: choose one of cola sst2" in downloads.run("mrcp", downloads.data, code=2).stderr
    assert "give a task and a folder" in downloads.run("mrpc", code=2).stderr
    assert not downloads.data.exists() and "Usage" in downloads.run("--help").stdout


def test_every_file_has_a_checksum(harness, tmp_path):
    """All tasks, without a network: the script names each file, and glue.sha256 knows it."""
    env = {"FRUGAL_GLUE_URL": "http://127.0.0.1:9"}
    script = REPOSITORY / "scripts" / "download_finetune_dataset.sh"
    said = harness.command("bash", script, "all", tmp_path, env=env).check(2).stderr
    named = {line.removeprefix("  https://dl.fbaipublicfiles.com/") for line in said.splitlines() if line[0] == " "}
    known = dict(reversed(line.split()) for line in (REPOSITORY / "scripts" / "glue.sha256").read_text().splitlines())
    assert named == known.keys() and len(named) == 12 and all(len(value) == 64 for value in known.values())
