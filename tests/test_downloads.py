"""Text from elsewhere: addresses, a corpus's mirror on the hub, datasets, Megatron's token files."""

import hashlib
import http.server
import json
import sys
import threading
from collections import Counter

import pytest
from test_prepare_pile_data import documents, texts, write_lines

from common.data.token_files import TokenFile
from common.prepare.inputs import MIRRORS

CONTENT = "".join(f"{text}\n" for text in texts(4000)).encode()


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` {path: bytes}, in parts too; `faults` [(path, what it does instead)] happen once each."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.asked, self.version = {}, [], [], '"one"'
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Range")))
        self.answer(body=True)

    def answer(self, body):
        path, server = self.path.partition("?")[0], self.server
        fault = next((found for found in server.faults if found[0] == path and body), None)
        if fault:
            server.faults.remove(fault)
        if fault and isinstance(fault[1], int):
            return self.send_error(fault[1])
        if path not in server.files:
            return self.send_error(404)
        content, first = server.files[path], 0
        if (wanted := self.headers.get("Range")) and self.headers.get("If-Range") in (None, server.version):
            first = int(wanted.removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.send_header("ETag", server.version)
        self.send_header("Content-Type", "text/html" if path.endswith("page.txt") else "application/octet-stream")
        self.end_headers()
        if body:
            self.wfile.write(content[first : len(content) // 2 if fault else None])
            if fault and fault[1] == "other version":
                server.version = '"two"'
            self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def prepare(harness, tmp_path):
    def run(*words, out="out", code=0):
        flags = {"--output_dir": [tmp_path / out], "--tokenizer_train_vocab_size": [400], "--workers": [1]}
        flags |= {"--validation_split_percentage": [10], "--test_split_percentage": [0]}
        more = [word for name, values in flags.items() if name not in words for word in (name, *values)]
        return harness.run("prepare_pile_data.py", *words, *more).check(code)

    return run


def all_documents(folder):
    return sorted(documents(folder, "train") + documents(folder, "validation"))


def test_a_download_that_stops_goes_on(prepare, server, tmp_path):
    server.files["/a/text.txt"] = CONTENT
    server.faults = [("/a/text.txt", "half"), ("/a/text.txt", 503)]
    sums = tmp_path / "sums.txt"
    sums.write_text(f"{hashlib.sha256(CONTENT).hexdigest()}  text.txt\n")
    said = prepare("--input", f"{server.address}/a/text.txt", "--checksums", sums).stdout
    assert all_documents(tmp_path / "out") == sorted(texts(4000))
    (_, first), *others = server.asked
    assert first is None and len(others) == 2
    assert all(0 < int(wanted.removeprefix("bytes=")[:-1]) <= len(CONTENT) // 2 for _, wanted in others)
    assert said.count("download of text.txt stopped (") == 2 and "the server answers 503" in said
    assert "download of text.txt: continued at" in said
    assert [path.name for path in (tmp_path / "out" / "downloads").glob("[!.]*")] == ["text.txt"]
    server.asked.clear()
    assert "finished already" in prepare("--input", f"{server.address}/a/text.txt", "--checksums", sums).stdout
    assert not server.asked


def test_another_version_is_not_mixed_with_the_first(prepare, server, tmp_path):
    server.files["/text.txt"] = CONTENT
    server.faults = [("/text.txt", "other version")]
    prepare("download", "--input", f"{server.address}/text.txt", "--remove_downloads")
    assert (tmp_path / "out" / "downloads" / "text.txt").read_bytes() == CONTENT
    assert [wanted is None for _, wanted in server.asked] == [True, False]
    prepare("--input", f"{server.address}/text.txt", "--remove_downloads")
    assert not (tmp_path / "out" / "downloads" / "text.txt").exists() and len(server.asked) == 2
    assert "finished already" in prepare("--input", f"{server.address}/text.txt", "--remove_downloads").stdout
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("name", "said"), [("none.txt", "answers 404"), ("page.txt", "with a web page"), ("text.txt", "SHA-256 is")]
)
def test_what_is_not_the_file(prepare, server, tmp_path, name, said):
    server.files = {"/page.txt": b"<html>", "/text.txt": CONTENT}
    sums = tmp_path / "sums.txt"
    sums.write_text(f"{'0' * 64}  text.txt\n")
    error = prepare("--input", f"{server.address}/{name}", "--checksums", sums, code=2).stderr
    assert said in error and f"{server.address}/{name}" in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "downloads" / name).exists()


def test_the_piles_mirror_by_its_name(harness, server, data_folder, tmp_path):
    repository, names = MIRRORS["pile"]
    for number in (0, 29):
        lines = [json.dumps({"text": text, "meta": {"pile_set_name": "Some"}}) for text in texts(60, seed=number)]
        server.files[f"/datasets/{repository}/resolve/main/{names[number]}"] = compressed("\n".join(lines))
    flags = ["--input", "pile", "--output_dir", tmp_path / "out", "--workers", 1]
    flags += ["--tokenizer_name", data_folder / "vocab" / "bert-base-uncased"]
    env = {"HF_ENDPOINT": server.address}
    harness.command(sys.executable, "prepare_pile_data.py", "tokenize", "0,29", *flags, env=env).check()
    shards = {path.stem: TokenFile(path.with_suffix("")) for path in (tmp_path / "out" / "shards").glob("*.bin")}
    assert {name: shard.num_documents for name, shard in shards.items()} == {"00000": 60, "00029": 60}
    ended = harness.command(sys.executable, "prepare_pile_data.py", "merge", *flags, env=env).check(2)
    assert "missing: tokenize 1,2," in ended.stderr


def compressed(text):
    import zstandard

    return zstandard.compress(text.encode())


@pytest.mark.parametrize("files", [1, 4])
def test_a_dataset_is_streamed(prepare, tmp_path, files):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "set").mkdir()
    found = texts(120)
    for number in range(files):
        table = pyarrow.table({"content": found[number::files]})
        name = f"train-{number:05d}-of-{files:05d}.parquet"
        pyarrow.parquet.write_table(table, tmp_path / "set" / name)
    flags = ["--dataset_name", tmp_path / "set", "--num_shards", 2, "--cache_dir", tmp_path / "cache"]
    prepare(*flags, "--text_column", "content")
    assert all_documents(tmp_path / "out") == sorted(found)
    assert 'no column "text" (there are: content)' in prepare(*flags, out="bad", code=2).stderr
    assert "has no split none" in prepare(*flags, "--dataset_split", "none", out="bad", code=2).stderr


def test_several_datasets_are_read_one_after_the_other(prepare, tmp_path):
    import pyarrow
    import pyarrow.parquet

    found = texts(120)
    for name, part in (("one", found[:50]), ("two", found[50:])):
        (tmp_path / name / "small").mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": part}), tmp_path / name / "small" / "train.parquet")
    flags = ["--dataset_name", tmp_path / "one", tmp_path / "two", "--cache_dir", tmp_path / "cache"]
    prepare(*flags, "--dataset_config_name", "small", "small")
    assert all_documents(tmp_path / "out") == sorted(found)
    said = prepare(*flags, "--dataset_config_name", "small", out="bad", code=2).stderr
    assert "--dataset_config_name small: give one for each --dataset_name (2)" in said


def test_megatrons_pair_is_decoded(prepare, data_folder, tmp_path):
    genuine = data_folder / "megatron"
    folder = tmp_path / "vocabulary"
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((genuine / f"gpt2-tiny-{name}").read_bytes())
    flags = ["--tokenizer_name", folder, "--append_eod", "--deduplicate", "false", "--validation_split_percentage", 0]
    prepare("--input", genuine / "meg-gpt2-openwebtext_text_document.bin", *flags)
    original = genuine / "meg-gpt2-openwebtext_text_document.bin"
    assert (tmp_path / "out" / "train.bin").read_bytes() == original.read_bytes()
    flags = ["--num_shards", 2, "--input_tokenizer_name", folder, "--deduplicate", "false"]
    prepare("--input", original, *flags, out="again")  # for a tokenizer of its own
    counts = [TokenFile(tmp_path / "again" / name).num_documents for name in ("train", "validation")]
    assert sum(counts) == 1000
    error = prepare("--input", original, code=2, out="bad").stderr
    assert "name the tokenizer that made them with --input_tokenizer_name" in error


def test_the_same_file_by_two_patterns_is_read_once(prepare, tmp_path):
    write_lines(tmp_path / "a.txt", texts(50))
    prepare("--input", tmp_path / "a.txt", f"{tmp_path}/*.txt", "--deduplicate", "false")
    assert max(Counter(all_documents(tmp_path / "out")).values()) == 1
