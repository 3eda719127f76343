"""A model on paper: its shapes, its size, and the memory that each YAML needs for it. Nothing is allocated."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from common.memory import GB, STRATEGIES, MemoryEstimate, Workload, estimate
from common.models.presets import feed_forward_size
from common.parallel.configs import single_machine_configs
from common.parallel.slicing import slicing_fault

CONFIGS = Path(__file__).resolve().parents[1] / "accelerate_configs"
CARD_GB = 80
MOST_CARDS = 2**16
COLUMNS = ("parameters", "gradients", "optimizer", "update", "buffers", "activations", "logits", "apart")
COLUMNS += ("total", "host")


class Planned(NamedTuple):
    """A YAML's Path, the Workload under it, and what a process holds."""

    config: Path
    workload: Workload
    parts: MemoryEstimate


def planned(workload, every=False):
    """The workload on GPUs under each YAML that its model allows, those first that cut and move the least.

    Args:
        workload: common.memory.Workload, whatever it says of strategy and device.
        every: leave none out; without it those of one process come where there is one, those of several elsewhere,
            HSDP and slices where the processes can be grouped, and offloading everywhere.
    Returns:
        list of Planned.
    """
    processes, rows = workload.processes, []
    for path, sharding in single_machine_configs(CONFIGS):
        if slicing_fault(workload.config, sharding["slices"]):
            continue
        if every or sharding["offload"] or _suits(sharding, processes):
            ranks = max(1, processes // sharding["slices"])
            under = replace(workload, **sharding | {"ranks": ranks}, device="cuda")
            rows.append(Planned(path, under, estimate(under)))
    strategies = list(STRATEGIES)
    return sorted(
        rows, key=lambda row: (row.workload.offload, row.workload.slices, strategies.index(row.workload.strategy))
    )


def _suits(sharding, processes):
    slices, groups = sharding["slices"], sharding["replicas"]
    least = 1 if sharding["strategy"] == "ddp" and slices > 1 else 2  # of processes that share a slice
    ranks, rest = divmod(processes, slices)
    if slices == 1 and sharding["ranks"] == 1:
        return processes == 1
    return not rest and ranks >= least and ranks % groups == 0 and (groups == 1 or ranks > groups)


def format_plan(rows, name, card_gb=CARD_GB):
    """The plan as lines to print.

    Args:
        rows: as planned() returned them; name: of the model, for the heading; card_gb: memory of a device, in GB of
            1e9 bytes.
    Returns:
        str of several lines.
    """
    workload = rows[0].workload
    config, model = workload.config, replace(workload, slices=1).footprint()
    table = [["config", *COLUMNS, "fits", "cards"]]
    for row in rows:
        figures = [f"{getattr(row.parts, column) / GB:,.2f}" for column in COLUMNS]
        fits = "yes" if row.parts.total <= card_gb * GB else "no"
        table.append([row.config.stem, *figures, fits, cards(row.workload, card_gb) or "never"])
    checkpointing = ", gradient checkpointing" if workload.gradient_checkpointing else ""
    return "\n".join(
        [
            f"{name}: {config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
            f"{config.num_attention_heads} heads, feed-forward {feed_forward_size(config)}, "
            f"vocabulary {config.vocab_size}, {getattr(config, 'max_position_embeddings', 'any number of')} positions",
            f"parameters: {model.parameters:,}",
            f"weights: {4 * model.parameters / GB:,.2f} GB in fp32, {2 * model.parameters / GB:,.2f} GB in bf16",
            f"memory of each of {workload.processes} GPU(s) in GB, {workload.precision}, {workload.optimizer_type}, "
            f"{workload.rows} rows of {workload.seq_length} tokens{checkpointing}",
            "(buffers: tensors made whole for their turn, and what is sent; apart: parts that are not there at the",
            f"same time; host: each process's share in the host's memory; fits: a card of {card_gb:g} GB; cards: the",
            "least number of them, a power of two; processes that share a layer's slices share the rows, too)",
            *aligned(table),
        ]
    )


def aligned(table):
    """The rows of a table as lines, all but the first column to the right."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*table, strict=True)]
    return [
        "  " + "  ".join([f"{row[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    ]


def cards(workload, card_gb=CARD_GB):
    """The smallest number of devices, a power of two for each slice, that hold a workload; None where none does."""
    ranks = workload.replicas
    while ranks <= MOST_CARDS:
        if estimate(replace(workload, ranks=ranks)).total <= card_gb * GB:
            return ranks * workload.slices
        ranks *= 2
    return None
