"""The README's table of strategies, from the comments of the YAMLs and from what the tests have shown.

`bash scripts/run_tests.sh all --write-strategies` writes the results and the table; with fewer tests it brings those
up to date. See conftest.py; a test takes part by the fixture `shows`.
"""

import json
import re
import subprocess
from datetime import date

from harness import REPOSITORY

RESULTS = REPOSITORY / "tests" / "strategies.json"
README = REPOSITORY / "README.md"
CONFIGS = REPOSITORY / "accelerate_configs"
BEGIN, END = "<!-- strategies -->", "<!-- end -->"
SCRIPTS = ("run_pretraining.py", "run_clm.py", "run_glue.py")


def write(reports, every):
    """Record what a session's tests have shown, and bring the README up to date.

    Args:
        reports: of pytest, of the tests that ran; every: whether those are all there are, else what is known of the
            others that are still there stays, with the commit that it is of.
    """
    words = ["git", "describe", "--always", "--dirty"]
    head = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()
    known = {} if every else {test: row for test, row in json.loads(RESULTS.read_text()).items() if _exists(test)}
    for report in reports:
        shown = dict(report.user_properties)
        if "strategy" in shown:
            known[report.nodeid] = shown | {"passed": report.passed, "commit": head, "date": date.today().isoformat()}
    RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    text = README.read_text()
    before, after = text.index(BEGIN), text.index(END, text.index(BEGIN))
    README.write_text(text[:before] + BEGIN + "\n" + render() + text[after:])


def render():
    """The table as Markdown lines."""
    tests = json.loads(RESULTS.read_text()).values()
    runs = sorted({f"{test['date']} on commit {test['commit']}" for test in tests})
    lines = [
        f"Tested on CPU processes, {', '.join(runs)}; on GPUs nothing is tested yet.",
        "",
        f"| YAML | what | choose it when | {' | '.join(f'`{script}`' for script in SCRIPTS)} |",
        "|---|---|---|" + "---|" * len(SCRIPTS),
    ]
    for path in sorted(CONFIGS.glob("*.yaml")):
        what, when = describe(path)
        of_yaml = [test for test in tests if test["strategy"] == path.stem]
        cells = [_cell([test for test in of_yaml if test["script"] == script]) for script in SCRIPTS]
        lines.append(f"| `{path.stem}` | {what} | {when} | {' | '.join(cells)} |")
    return "".join(f"{line}\n" for line in lines)


def describe(path):
    """(what, when) from the comment at the head of a YAML: what it is, and `Choose it when ...`."""
    head = re.match(r"(?:# .*\n)+", path.read_text())[0]
    text = " ".join(line.removeprefix("# ") for line in head.splitlines())
    what, when = re.match(r"(.*?)\. Choose it (.*?)(?:\. |\.?$)", text).groups()
    return what, when


def _exists(test):
    file, function = test.split("[")[0].split("::")
    path = REPOSITORY / file
    return path.exists() and f"def {function}(" in path.read_text()


def _cell(tests):
    failed = sum(not test["passed"] for test in tests)
    if not tests or failed:
        return f"**{failed} of {len(tests)} tests failed**" if failed else "not tested"
    processes = max(test["processes"] for test in tests)
    return f"{processes} process{'es' * (processes > 1)}, {len(tests)} test{'s' * (len(tests) > 1)}"
