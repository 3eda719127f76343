"""The README's table of strategies, from the comments of the YAMLs and from what the tests have shown.

`bash scripts/run_tests.sh all --write-strategies` writes the results and the table; see conftest.py. A test takes part
by the fixture `shows`.
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


def write(reports):
    """Record what a session's tests have shown, and bring the README up to date.

    Args:
        reports: of pytest, of all tests that ran.
    """
    found = {}
    for report in reports:
        shown = dict(report.user_properties)
        if "strategy" in shown:
            cell = found.setdefault((shown["strategy"], shown["script"]), {"processes": 0, "tests": 0, "failed": 0})
            cell["processes"] = max(cell["processes"], shown["processes"])
            cell["tests" if report.passed else "failed"] += 1
    head = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True)
    rows = {}
    for (name, script), cell in sorted(found.items()):
        rows.setdefault(name, {})[script] = cell
    values = {"commit": head.stdout.strip(), "date": date.today().isoformat(), "rows": rows}
    RESULTS.write_text(json.dumps(values, indent=1) + "\n")
    text = README.read_text()
    before, after = text.index(BEGIN), text.index(END, text.index(BEGIN))
    README.write_text(text[:before] + BEGIN + "\n" + render() + text[after:])


def render():
    """The table as Markdown lines."""
    results = json.loads(RESULTS.read_text())
    lines = [
        f"Tested on CPU processes, commit {results['commit']}, {results['date']}; on GPUs nothing is tested yet.",
        "",
        f"| YAML | what | choose it when | {' | '.join(f'`{script}`' for script in SCRIPTS)} |",
        "|---|---|---|" + "---|" * len(SCRIPTS),
    ]
    for path in sorted(CONFIGS.glob("*.yaml")):
        what, when = describe(path)
        cells = [_cell(results["rows"].get(path.stem, {}).get(script)) for script in SCRIPTS]
        lines.append(f"| `{path.stem}` | {what} | {when} | {' | '.join(cells)} |")
    return "".join(f"{line}\n" for line in lines)


def describe(path):
    """(what, when) from the comment at the head of a YAML: what it is, and `Choose it when ...`."""
    head = re.match(r"(?:# .*\n)+", path.read_text())[0]
    text = " ".join(line.removeprefix("# ") for line in head.splitlines())
    what, when = re.match(r"(.*?)\. Choose it (.*?)(?:\. |\.?$)", text).groups()
    return what, when


def _cell(result):
    if result is None:
        return "not tested"
    if result["failed"]:
        return f"**{result['failed']} tests failed**"
    processes, tests = result["processes"], result["tests"]
    return f"{processes} process{'es' * (processes > 1)}, {tests} test{'s' * (tests > 1)}"
