"""A model on paper: its shapes, its size, and the memory that each strategy needs for it. Nothing is allocated."""

from dataclasses import replace

from common.memory import GB, STRATEGIES, estimate
from common.models.footprint import feed_forward_size

CARD_GB = 80
MOST_CARDS = 2**16
COLUMNS = ("parameters", "gradients", "optimizer", "update", "activations", "logits", "apart", "total", "host")


def format_plan(workload, name):
    """The plan as lines to print.

    Args:
        workload: common.memory.Workload; each strategy gets a line, on GPUs, whatever the workload says of it.
        name: of the model, for the heading.
    Returns:
        str of several lines.
    """
    config, model = workload.config, workload.footprint()
    rows = []
    for strategy, cut in STRATEGIES.items():
        for offload in (False, True) if cut.optimizer else (False,):
            planned = replace(workload, strategy=strategy, offload=offload, device="cuda")
            parts = estimate(planned, footprint=model)
            figures = [f"{getattr(parts, column) / GB:,.2f}" for column in COLUMNS]
            rows.append([strategy + " + offload" * offload, *figures, cards(planned, model) or "never"])
    checkpointing = ", gradient checkpointing" if workload.gradient_checkpointing else ""
    return "\n".join(
        [
            f"{name}: {config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
            f"{config.num_attention_heads} heads, feed-forward {feed_forward_size(config)}, "
            f"vocabulary {config.vocab_size}, {config.max_position_embeddings} positions",
            f"parameters: {model.parameters:,}",
            f"weights: {4 * model.parameters / GB:,.2f} GB in fp32, {2 * model.parameters / GB:,.2f} GB in bf16",
            f"memory of each of {workload.ranks} GPU(s) in GB, {workload.precision}, {workload.optimizer_type}, "
            f"{workload.rows} rows of {workload.seq_length} tokens{checkpointing}; host: with the optimizer state "
            f"offloaded; cards: at least so many of {CARD_GB} GB, a power of two:",
            *_aligned([["strategy", *COLUMNS, "cards"], *rows]),
        ]
    )


def _aligned(table):
    """The rows of a table as lines, numbers to the right."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*table, strict=True)]
    return [
        "  " + "  ".join([f"{row[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    ]


def cards(workload, footprint, card_gb=CARD_GB):
    """The smallest power of two of devices that hold a workload, or None where no number does."""
    ranks = 1
    while ranks <= MOST_CARDS:
        if estimate(replace(workload, ranks=ranks), footprint=footprint).total <= card_gb * GB:
            return ranks
        ranks *= 2
    return None
