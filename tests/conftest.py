"""Fixtures that all tests share."""

import os
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import strategy_table

from harness import OFFLINE, REPOSITORY, Harness

os.environ.update(OFFLINE)  # here too, before a library reads it: a name that is not there is not asked for

DATA_FOLDER = Path(os.environ.get("FRUGAL_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
DATA_ABSENT = "real test data is absent"


@pytest.fixture(scope="session")
def harness():
    """Runs scripts as processes; see tests/harness.py."""
    harness = Harness()
    yield harness
    harness.close()


@pytest.fixture(scope="session")
def data_folder():
    """The folder with the real data sets (FRUGAL_TEST_DATA, default ../shared/data); skips where it is absent."""
    if not DATA_FOLDER.is_dir():
        pytest.skip(f"{DATA_ABSENT}: no folder {DATA_FOLDER}; set FRUGAL_TEST_DATA")
    return DATA_FOLDER


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory):
    """A text file of 400 English documents, one a line: paragraphs of Python's own help, the same in every run."""
    paragraphs = (" ".join(paragraph.split()) for name in sorted(topics) for paragraph in topics[name].split("\n\n"))
    documents = [text for text in dict.fromkeys(paragraphs) if len(text) >= 100][:400]
    path = tmp_path_factory.mktemp("corpus") / "tiny.txt"
    path.write_text("".join(f"{document}\n" for document in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache folder for prepared data that all tests of this worker share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def out(tmp_path):
    """A path for a run's output folder, which does not exist yet."""
    return tmp_path / "out"


@pytest.fixture
def shows(record_property):
    """A function of a YAML's name, a script and a number of processes: what a test shows to work, for the README."""

    def record(strategy, script, processes):
        for name, value in (("strategy", strategy), ("script", script), ("processes", processes)):
            record_property(name, value)

    return record


def pytest_addoption(parser):
    """--write-strategies, for a session of all tests, or of those that are to be brought up to date."""
    parser.addoption("--write-strategies", action="store_true", help="write the README's table of strategies")


def pytest_collection_modifyitems(items):
    """Skip the tests marked gpu where there is no CUDA device; torch is imported only if there are such tests."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_terminal_summary(terminalreporter, config):
    """Say how many tests did not run for want of the real data; write the table of strategies where asked."""
    if config.getoption("--write-strategies") and not hasattr(config, "workerinput"):  # xdist's workers come here, too
        outcomes, option = ("passed", "failed"), config.option
        every = not (option.markexpr or option.keyword) and config.args_source is config.ArgsSource.TESTPATHS
        reports = [report for name in outcomes for report in terminalreporter.stats.get(name, [])]
        strategy_table.write(reports, every)
    skipped = sum(DATA_ABSENT in str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
    if skipped:
        terminalreporter.write_line(f"{skipped} tests were skipped: {DATA_ABSENT} ({DATA_FOLDER}; FRUGAL_TEST_DATA)")
