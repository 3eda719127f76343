"""What may know what: backends stay in common/parallel, scripts stay apart, files name no machine."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from harness import REPOSITORY

BACKENDS = ("torch.distributed", "deepspeed", "colossalai")
# Words that betray a backend in a script's code: the first wherever they stand, the others as whole words.
BACKEND_PARTS = (
    "deepspeed",
    "fsdp",
    "colossal",
    "megatron_lm",
    "dataparallel",
    "distributedtype",
    "pipedream",
    "gpipe",
)
BACKEND_WORDS = {"ddp", "gemini", "1f1b", "2bw", "zero1", "zero2", "zero3", "nccl", "gloo", "interleaved"}
MACHINE_PATH = re.compile(r"(?<![\w.~])/(home|work|root|Users)/")
REGISTRY = re.compile(r"https?://[^\s/]*(pypi|pythonhosted|pytorch\.org/whl|anaconda|registry|artifactory|devpi)")


def project_files():
    """Returns: paths of the files that are, or could be, committed, relative to the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        paths = [Path(line) for line in listed.stdout.splitlines()]
    else:  # an unpacked archive
        paths = [path.relative_to(REPOSITORY) for path in REPOSITORY.rglob("*")]
        paths = [path for path in paths if not path.parts[0].startswith((".venv", ".git", "runs", "cache"))]
    return [path for path in paths if (REPOSITORY / path).is_file()]


FILES = project_files()
SCRIPTS = [path for path in FILES if len(path.parts) == 1 and path.suffix == ".py"]
SHELL = [path for path in FILES if path.suffix in (".sh", ".sbatch") or path == Path(".ci/run")]
CODE = [path for path in FILES if path.suffix == ".py" and path.parts[0] != "tests"]


def parse(path):
    return ast.parse((REPOSITORY / path).read_text(encoding="utf-8"), filename=str(path))


def imported_names(tree):
    """Dotted names that the code imports, and the attribute chains that reach into them.

    Returns:
        set of names such as "torch.distributed.run", of imports inside functions too; those of a relative import
        begin with a dot.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names |= {argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)}
    return names


def within(names, packages):
    """Returns: the names that are one of the packages or lie inside one, sorted."""
    return sorted(name for name in names if any(name == p or name.startswith(f"{p}.") for p in packages))


def backend_words(tree):
    """Identifiers and strings of the code that name a backend; docstrings and help texts are for people."""
    for_people = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            for_people.add(node.value)
        if isinstance(node, ast.keyword) and node.arg == "help":
            for_people |= set(ast.walk(node.value))
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "help":
                    for_people |= set(ast.walk(value))
    texts = set()
    for node in ast.walk(tree):
        if node in for_people:
            continue
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            texts.add(getattr(node, field, None))
        if isinstance(node, ast.Constant):
            texts.add(node.value)
    return sorted(text for text in texts if isinstance(text, str) and names_backend(text.lower()))


def names_backend(text):
    """Whether lower-case text contains a backend's name."""
    return any(part in text for part in BACKEND_PARTS) or bool(BACKEND_WORDS & set(re.findall(r"[a-z0-9]+", text)))


def test_only_common_parallel_reaches_other_processes():
    found = {
        str(path): within(imported_names(parse(path)), BACKENDS)
        for path in CODE
        if path.parts[:2] != ("common", "parallel")
    }
    assert {path: names for path, names in found.items() if names} == {}


def test_scripts_import_neither_each_other_nor_are_imported():
    names = [path.stem for path in SCRIPTS]
    found = {str(path): within(imported_names(parse(path)), names) for path in CODE}
    assert {path: imports for path, imports in found.items() if imports} == {}


def test_clock_and_schedules_stand_alone():
    for path in (Path("common/schedulers.py"), Path("common/clock.py")):
        if path in FILES:
            names = imported_names(parse(path))
            ours = set(within(names, ["common"])) | {name for name in names if name.startswith(".")}
            ours -= set(within(ours, ["common.errors", "common.plugins"]))  # which stand alone themselves
            assert ours == set(), path


def test_scripts_name_no_backend():
    found = {str(path): backend_words(parse(path)) for path in SCRIPTS}
    assert {path: words for path, words in found.items() if words} == {}


def test_shell_scripts_parse_and_begin_with_their_usage():
    assert Path("scripts/setup.sh") in SHELL
    for path in SHELL:
        checked = subprocess.run(["bash", "-n", REPOSITORY / path], capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, ""), path
        first, *lines = (REPOSITORY / path).read_text().splitlines()
        if first.startswith("# Sourced by"):  # a part of other scripts, not a command
            continue
        assert first == "#!/usr/bin/env bash", path
        head = lines[: next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))]
        assert any(line.lower().startswith("# usage:") for line in head), f"{path}: no '# Usage: …' in its head"


def test_no_file_names_a_machine_or_a_registry():
    found = []
    for path in FILES:
        try:
            lines = (REPOSITORY / path).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:  # binary
            continue
        found += [f"{path}:{n}: {line}" for n, line in enumerate(lines, 1) if names_a_place(line)]
    assert found == []


def names_a_place(line):
    return bool(MACHINE_PATH.search(line) or REGISTRY.search(line))


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.fsdp import fully_shard",
        "import torch\ntorch.distributed.barrier()",
        "def late():\n    import deepspeed",
        "import importlib\nimportlib.import_module('colossalai.booster')",
    ],
)
def test_backend_imports_are_found(source):
    assert within(imported_names(ast.parse(source)), BACKENDS)


def test_other_imports_are_left_alone():
    source = "import torch\nfrom common.parallel import make_accelerator\ntorch.distributions.Normal(0, 1)"
    assert within(imported_names(ast.parse(source)), BACKENDS) == []


@pytest.mark.parametrize(
    "source",
    [
        "if accelerator.distributed_type == DistributedType.FSDP: pass",
        "use_deepspeed = True",
        "config = 'accelerate_configs/ddp.yaml'",
        "train(schedule='1f1b')",
        "from torch.nn.parallel import DistributedDataParallel as D",
    ],
)
def test_backend_words_are_found(source):
    assert backend_words(ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        '"""Run with accelerate_configs/ddp.yaml."""',
        "field(metadata={'help': 'not with DeepSpeed'})",
        "add(help='ddp ' + name)",
        "added = ddpm = 'megatron-bert'",
    ],
)
def test_text_for_people_and_other_words_are_left_alone(source):
    assert backend_words(ast.parse(source)) == []


@pytest.mark.parametrize(("line", "found"), [("cd {0}x", True), ("ls ~{0}x", False), ("see a.b{0}x", False)])
def test_machine_paths_are_found(line, found):
    assert names_a_place(line.format("/" + "home/")) is found
