"""Whether the hub, or what is on it, can be had, as the shell scripts ask it."""

import http.server
import sys
import threading

import pytest

from harness import REPOSITORY

MODEL, DATASET = ["owner/model"], ["Owner/MyData", "small-v1"]


@pytest.fixture
def can_be_had(harness, tmp_path):
    """Asks python -m common.data.hub, with caches of its own."""

    def ask(words, **env):
        env = {"HF_HOME": tmp_path, "HF_HUB_OFFLINE": None, "HF_DATASETS_OFFLINE": None, **env}
        result = harness.command(sys.executable, "-m", "common.data.hub", *words, env=env, cwd=REPOSITORY)
        assert result.returncode in (0, 1) and result.stdout == result.stderr == "", result
        return result.returncode == 0

    return ask


@pytest.fixture
def listener():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_hub_that_answers_is_in_reach_unless_offline(can_be_had, listener):
    assert can_be_had(MODEL, HF_ENDPOINT=listener)
    assert can_be_had(DATASET, HF_ENDPOINT=listener)
    assert not can_be_had(MODEL, HF_ENDPOINT=listener, HF_HUB_OFFLINE="1")
    assert not can_be_had(MODEL, HF_ENDPOINT="http://127.0.0.1:9")


def test_a_model_in_the_cache(can_be_had, tmp_path):
    snapshot = tmp_path / "hub" / "models--owner--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "models--owner--model" / "refs").mkdir()
    (tmp_path / "hub" / "models--owner--model" / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    assert not can_be_had(MODEL, HF_HUB_OFFLINE="1")  # not its weights
    (snapshot / "pytorch_model.bin").touch()
    assert can_be_had(MODEL, HF_HUB_OFFLINE="1") and not can_be_had(["owner/other"], HF_HUB_OFFLINE="1")


def test_a_dataset_in_the_cache(can_be_had, tmp_path):
    (tmp_path / "datasets" / "Owner___my_data" / "small-v1" / "0.0.0").mkdir(parents=True)
    assert can_be_had(DATASET, HF_HUB_OFFLINE="1")
    assert not can_be_had(["Owner/MyData", "large-v1"], HF_HUB_OFFLINE="1")
    assert not can_be_had(["Other/MyData", "small-v1"], HF_HUB_OFFLINE="1")
    assert can_be_had(["Owner/MyData", "small-v1"], HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=tmp_path / "datasets")
