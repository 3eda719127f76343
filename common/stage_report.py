"""What the processes of a pipeline did in a throughput experiment: a picture, and how long each has waited."""

import itertools
import json
from statistics import median

from common.report import save_figure

TIMELINE, FIGURES = "timeline.png", "stages.json"
STEPS_SHOWN = 4
STAGE_LINE = (
    "process {process}, stage {stage}: {median_step_seconds:.3f} s a step, {bubble_share:.1%} of the time waiting or "
    "communicating ({idle_seconds:.2f} s + {communication_seconds:.2f} s), peak memory {peak_memory_gb:.2f} GB"
)
COMPUTING = {"forward": "tab:blue", "backward": "tab:orange", "update": "tab:green"}
COLORS = COMPUTING | {"communication": "tab:gray"}


def write_stage_report(folder, every, title):
    """Write timeline.png, one lane for each process, and stages.json.

    Args:
        folder: Path; every: list of dicts by process, as StageTimes.gather gives them; title: heading.
    Returns:
        dict: bubble_share, the mean share of the time in which a process computed nothing, and stages, by process.
    """
    gaps = [_gaps(process, every) for process in every]
    rows = [_figures(process, *spans) for process, spans in zip(every, gaps, strict=True)]
    updates = [one.end for one in every[0]["passes"] if one.kind == "update"]
    begin = updates[-STEPS_SHOWN - 1] if len(updates) > STEPS_SHOWN else 0.0
    for number, (row, process) in enumerate(zip(rows, every, strict=True)):
        row["process"] = number
        row["last_passes"] = [one._asdict() for one in process["passes"] if one.end > begin]
    (folder / FIGURES).write_text(json.dumps(rows, indent=1) + "\n")
    _draw(folder / TIMELINE, every, [communicating for _, communicating in gaps], begin, title)
    return {"bubble_share": sum(row["bubble_share"] for row in rows) / len(rows), "stages": rows}


def _gaps(process, every):
    """What lies between a process's passes.

    A pass needs the same micro-batch's pass on the stage before (backward: behind) it, an update the last backward
    pass of its batch on every stage. Until that one has ended, this process is idle; then it is sent and received, and
    summed over the processes, and the host gets on to the pass.

    Returns:
        (idle, communicating): lists of (begin, end) in seconds.
    """
    passes = [one for other in every if other["copy"] == process["copy"] for one in other["passes"]]
    ended = {one[:3]: one.end for one in passes}
    stages = {one.stage for one in passes} - {None}
    idle, communicating, free = [], [], 0.0
    for one in process["passes"]:
        if one.kind == "update":
            needs = [("backward", stage, one.micro_batch) for stage in stages]
        else:
            needs = [(one.kind, one.stage + (-1 if one.kind == "forward" else 1), one.micro_batch)]
        ready = min(one.begin, max(free, *(ended.get(need, 0.0) for need in needs)))
        idle.append((free, ready))
        communicating.append((ready, one.begin))
        free = one.end
    return [*idle, (free, process["seconds"])], communicating


def _figures(process, idle, communicating):
    updates = [one.end for one in process["passes"] if one.kind == "update"]
    busy = {kind: _seconds((p.begin, p.end) for p in process["passes"] if p.kind == kind) for kind in COMPUTING}
    steps = [later - earlier for earlier, later in itertools.pairwise(updates)]
    return {
        **{name: value for name, value in process.items() if name != "passes"},
        **{f"{kind}_seconds": seconds for kind, seconds in busy.items()},
        "idle_seconds": _seconds(idle),
        "communication_seconds": _seconds(communicating),
        "peak_memory_gb": process["peak_memory_bytes"] / 1e9,
        "bubble_share": 1 - sum(busy.values()) / process["seconds"],
        "step_seconds": steps,
        "median_step_seconds": median(steps) if steps else None,
    }


def _seconds(spans):
    return sum(end - begin for begin, end in spans)


def _draw(path, every, communicating, begin, title):
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.patches import Patch

    end = max(process["seconds"] for process in every)
    figure = Figure(figsize=(12, 1.5 + 0.6 * len(every)), dpi=120, layout="constrained")
    axis = figure.subplots()
    axis.set_title(title, fontsize=11)
    for lane, (process, between) in enumerate(zip(every, communicating, strict=True)):
        spans = {kind: [(p.begin, p.end) for p in process["passes"] if p.kind == kind] for kind in COMPUTING}
        for kind, color in COLORS.items():
            shown = [(a, b - a) for a, b in (spans | {"communication": between})[kind] if b > max(a, begin)]
            axis.broken_barh(shown, (lane - 0.4, 0.8), facecolors=color, edgecolors="white", linewidth=0.4)
    names = [f"process {number}: stage {process['stage']}" for number, process in enumerate(every)]
    axis.set(yticks=range(len(every)), xlim=(begin, end), xlabel="seconds")
    axis.set_yticklabels(names)
    axis.invert_yaxis()
    patches = [Patch(facecolor=color, label=kind) for kind, color in COLORS.items()]
    patches.append(Patch(facecolor="white", edgecolor="gray", label="idle"))
    axis.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=len(patches), frameon=False)
    save_figure(figure, path)
