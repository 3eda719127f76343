"""Each case of benchmarks/bench_data.py measures what it says, on a short text."""

import pytest

from benchmarks import bench_data
from common.data.tokenizers import load_tokenizer


@pytest.fixture
def text(data_folder, tmp_path, monkeypatch):
    """A text of some thousand tokens, and counts that go with it."""
    monkeypatch.setattr(bench_data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(bench_data, "OUR_BATCHES", 3)
    monkeypatch.setattr(bench_data, "STOCK_BATCHES", 2)
    lines = (data_folder / "wikitext-2" / "valid.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    path = tmp_path / "text.txt"
    path.write_text("".join(lines[:400]), encoding="utf-8")
    return path


CASES = [name for name in bench_data.CASES if name != "first_step"]


@pytest.mark.parametrize("case", [*CASES, pytest.param("first_step", marks=pytest.mark.exhaustive)])
def test_a_case_runs(text, case):
    measured = bench_data.CASES[case](text)
    assert all(value > 0 for value in measured.values())
    documents, size = bench_data.documents_of(text)
    assert size == pytest.approx(text.stat().st_size / 1e6, rel=0.05)
    tokenizer = load_tokenizer(str(bench_data.VOCABULARY))
    tokens = sum(len(tokenizer(document, add_special_tokens=False)["input_ids"]) for document in documents)
    if case in ("ids", "files"):
        assert measured["tokens"] == tokens
    if case in ("files", "maps"):  # 2 bytes for an id, and the places of the documents; one of int32 and three of int8
        assert measured["bytes_per_token"] == pytest.approx({"files": 2.2, "maps": 7.1}[case], abs=0.4)
