"""Which pipeline is fastest: depth, width, micro-batch, accumulation and recomputation, by formula.

N devices run w copies of a pipeline of d stages, N = w·d, each stage with as many layers; a batch of B rows is cut
into m = B / (w·b) micro-batches of b rows for each copy. Times are of a stage i: f_i forward, b_i backward, x_i for
the exchange of its gradients between the copies; f and b include what it receives from and gives to its neighbours,
which is not overlapped with its products.

    2bw      max(m · max(f + b), (d - 1) · max(f + b) + max(x)): no flush, and gradients are exchanged while the next
             batch runs, up to where the first stage has the new weights to wait for
    1f1b     sum(f + b) + (m - 1) · max(f + b) + max(x): the pipeline fills and drains in every batch
    gpipe    sum(f + b) + (m - 1) · (max(f) + max(b)) + max(x): the same, all forward passes first
    none     m · sum(f + b) + max(x): one stage works at a time
    d = 1    (m - 1) · (f + b) + f + max(b, x): data parallelism, which exchanges during the last backward pass

With recomputation b_i grows by the forward pass of the stage (the paper's 4/3 of its products). Memory of a stage is
that of its weights (two versions under 2bw), gradients and optimizer state, and of the activations of the
micro-batches in flight: d - i of them, all m under gpipe, one under none; with recomputation these are the stage's
inputs, and the activations of one micro-batch.

Source: Narayanan et al. 2021 (PipeDream-2BW, arXiv:2006.09503), section 4 on planning, which has 2bw and none for
equal stages, and hides 2bw's exchange behind all m micro-batches. That bound of the exchange, schedules that exchange
behind a flush, and what embedding and head add to the ends are ours; tests/test_pipeline_plan.py simulates them.
"""

from dataclasses import dataclass, replace

from common.errors import UserError
from common.memory import GB, MOMENTS, loss_bytes
from common.memory_plan import aligned

SCHEDULES = ("2bw", "1f1b", "gpipe", "none")
FILLED = ("2bw", "1f1b")  # which need as many micro-batches as stages
NEIGHBOURS = ("stages", "copies")  # whose ranks follow each other, and so share a machine
RUNNERS_UP = 9


@dataclass(frozen=True)
class Candidate:
    """A pipeline and what is predicted of it.

    schedule: name in SCHEDULES, or "data parallel" (depth 1). depth: stages; width: copies of each. rows: of a
    micro-batch; micro_batches: of a batch, for each copy. recompute: whether stages keep their inputs alone. seconds:
    of a batch. idle: share of the time in which a stage, on average, waits. memory: bytes of the fullest device.
    """

    schedule: str
    depth: int
    width: int
    rows: int
    micro_batches: int
    recompute: bool
    seconds: float
    idle: float
    memory: int

    @property
    def rows_per_second(self):
        """Of all copies together."""
        return self.width * self.rows * self.micro_batches / self.seconds


def candidates(workload, hardware, devices, batch, schedules=SCHEDULES, most_rows=None, neighbours="stages"):
    """Every pipeline that the devices can run, and data parallelism.

    Args:
        workload: common.memory.Workload; its rows, recomputation and strategy do not matter. hardware:
            common.hardware_table.Hardware. devices: N; batch: B. schedules: names in SCHEDULES. most_rows: of a
            micro-batch, or None. neighbours: whose ranks follow each other: a pipeline's "stages", or the "copies" of
            a stage, as in PipeDream.
    Returns:
        list of Candidate, the fastest first, with those that do not fit the memory.
    Raises:
        UserError: a model whose layers cannot be on different stages; a bandwidth that the table does not have.
    """
    model, found = workload.footprint(), []
    for depth in range(1, min(devices, model.layers) + 1):
        width = devices // depth
        if devices % depth or model.layers % depth or batch % width:
            continue
        of_copy = batch // width
        for rows in (rows for rows in powers_of_two(most_rows or of_copy) if of_copy % rows == 0):
            micro_batches = of_copy // rows
            for recompute in (False, True):
                names = [name for name in schedules if name not in FILLED or micro_batches >= depth]
                for name in names if depth > 1 else ["data parallel"]:
                    shape = name, depth, width, rows, micro_batches, recompute, neighbours
                    found.append(predict(replace(workload, rows=rows), model, hardware, *shape))
    return sorted(found, key=lambda plan: (-round(plan.rows_per_second, 9), plan.memory, plan.depth))


def powers_of_two(most):
    """1, 2, 4, ... up to a number."""
    return [1 << n for n in range(most.bit_length())]


def predict(workload, model, hardware, schedule, depth, width, rows, micro_batches, recompute, neighbours="stages"):
    """What a pipeline takes.

    Args:
        workload: as candidates, with the micro-batch's rows; model: its footprint(); hardware, neighbours: as there;
            the others: as a Candidate's.
    Returns:
        Candidate.
    Raises:
        UserError: as candidates.
    """
    some = sorted({0, min(1, depth - 1), depth - 1})  # those between the ends are alike; the first holds most
    links = bandwidths(hardware, depth, width, neighbours)
    times = [stage_seconds(workload, model, hardware, links, depth, stage, recompute) for stage in some]
    times[1:-1] *= depth - 2
    exchange = max(exchange_seconds(workload, model, links, depth, width, stage) for stage in some)
    seconds = batch_seconds(schedule, times, exchange, micro_batches)
    idle = max(0.0, 1 - micro_batches * sum(map(sum, times)) / depth / seconds)
    memory = max(stage_bytes(workload, model, schedule, depth, stage, micro_batches, recompute) for stage in some)
    return Candidate(schedule, depth, width, rows, micro_batches, recompute, seconds, idle, memory)


# ---- Time --------------------------------------------------------------------------------------------


def batch_seconds(schedule, times, exchange, micro_batches):
    """Seconds of a batch, by the formulae above.

    Args:
        schedule: a name in SCHEDULES, or "data parallel". times: of each stage a pair of seconds, forward and
            backward, of a micro-batch. exchange: seconds, of the stage that takes longest. micro_batches: m.
    """
    m, through, slowest = micro_batches, sum(map(sum, times)), max(map(sum, times))
    forward, backward = (max(column) for column in zip(*times, strict=True))
    if schedule == "data parallel":
        return (m - 1) * slowest + forward + max(backward, exchange)
    if schedule == "2bw":
        return max(m * slowest, (len(times) - 1) * slowest + exchange)
    if schedule == "1f1b":
        return through + (m - 1) * slowest + exchange
    if schedule == "gpipe":
        return through + (m - 1) * (forward + backward) + exchange
    return m * through + exchange


def stage_seconds(workload, model, hardware, links, depth, stage, recompute):
    """Seconds of a stage for a micro-batch of workload.rows rows: (forward, backward). Args: links: as bandwidths."""
    rows, causal = workload.rows, workload.head == "causal"
    layer = rows * layer_flops(workload, model) / hardware.flops + hardware.layer_overhead
    predicted = workload.seq_length if causal else workload.targets
    head = rows * 2 * predicted * model.output / hardware.flops
    forward = model.layers // depth * layer + (head if stage == depth - 1 else 0)
    backward = hardware.backward_ratio * forward + (forward if recompute else 0)
    neighbours = (stage > 0) + (stage < depth - 1)
    sent = neighbours * rows * boundary_bytes(workload) / links[0]  # a tensor to or from each in either pass
    return forward + sent, backward + sent


def layer_flops(workload, model):
    """FLOPs of a layer's forward pass for a row: its products, and the scores and sums of attention."""
    length, width = workload.seq_length, workload.config.hidden_size
    products = 2 if workload.head == "causal" else 4  # attention that looks back has half
    return 2 * length * model.largest_layer + products * length**2 * width


def boundary_bytes(workload):
    """Bytes that go from a stage to the next for a row, the hidden states, or back, their gradient.

    Our stages (common.parallel.pipeline) send 32 bits in bf16, too; PipeDream's 16, in fp16, which ours do not have.
    """
    number = 2 if workload.precision == "fp16" else 4
    return number * workload.seq_length * workload.config.hidden_size


def exchange_seconds(workload, model, links, depth, width, stage):
    """Seconds to sum a stage's gradients, in 32 bits: over its copies, and a tied embedding's over both ends."""
    sent = 4 * stage_parameters(workload, model, depth, stage) * 2 * (width - 1) / width  # by each in a ring of w
    shared = 4 * model.output if depth > 1 and model.tied and stage in (0, depth - 1) else 0
    return sent / links[1] + shared / links[0]


def bandwidths(hardware, depth, width, neighbours):
    """Bytes/s from a device to the next stage, and to the next copy of its stage.

    Whose ranks follow each other share machines, as far as there is room; the others are on different ones, where as
    many as a machine has of them send at the same time.

    Args:
        hardware: Hardware; depth, width: as a Candidate's; neighbours: as candidates().
    Returns:
        (between stages, between copies); infinite where nothing is sent.
    Raises:
        UserError: the table does not have one.
    """
    per_machine, groups = hardware.devices_per_machine, {"stages": depth, "copies": width}
    near, apart = groups.pop(neighbours), groups.popitem()[1]
    everything_near = near * apart <= per_machine
    between_near = _link(hardware, near, near <= per_machine or everything_near, senders=1)
    between_apart = _link(hardware, apart, everything_near, senders=min(near, per_machine))
    return (between_near, between_apart) if neighbours == "stages" else (between_apart, between_near)


def _link(hardware, members, within, senders):
    """Bytes/s between members of a group, one after the other."""
    if members == 1:
        return float("inf")
    return GB * _known(hardware, "near") if within else GB * _known(hardware, "far") / senders


def _known(hardware, name):
    value = getattr(hardware, name)
    if value is None:
        between = "devices of a machine" if name == "near" else "machines"
        raise UserError(f"the hardware table says nothing of the bandwidth between {between}: add '{name}' in GB/s")
    return value


# ---- Memory ------------------------------------------------------------------------------------------


def stage_parameters(workload, model, depth, stage):
    """Numbers in a stage: its layers; the first has the embeddings too, the last the head (with a copy of a tied
    embedding); what else is outside the layers is counted at both ends.

    Raises:
        UserError: layers that share their weights.
    """
    outside = model.parameters - model.layers * model.largest_layer
    if model.own_layers < model.layers:
        raise UserError(
            f"the layers of a {workload.config.model_type} share their weights, and their pipelines are not planned: "
            "leave out --train_batch_size"
        )
    numbers = model.layers // depth * model.largest_layer
    if depth == 1:
        return numbers + outside
    if stage in (0, depth - 1):
        numbers += outside - (0 if model.tied else model.output)
    return numbers


def stage_bytes(workload, model, schedule, depth, stage, micro_batches, recompute):
    """Bytes of a device that runs a stage, for micro-batches of workload.rows rows; without the update's own."""
    layers, versions = model.layers // depth, 2 if schedule == "2bw" else 1
    moments = MOMENTS.get(workload.optimizer_type, 2)
    held = 4 * (versions + 1 + moments) * stage_parameters(workload, model, depth, stage)  # and the gradients

    ends = (stage == 0) + (stage == depth - 1)
    kept = workload.rows * layers * model.kept[1] + layers * model.copies[1]
    if ends:
        kept += workload.rows * model.kept[0] + model.copies[0]
    in_flight = {"gpipe": micro_batches, "none": 1, "data parallel": 1}.get(
        schedule, min(micro_batches, depth - stage)
    )
    activations = in_flight * kept
    if recompute:
        activations = in_flight * workload.rows * model.layer_input + kept
    backward = 2 * workload.rows * model.widest
    loss = loss_bytes(workload, model, workload.precision != "fp32")[0] if stage == depth - 1 else 0
    return held + activations + max(backward, loss)


# ---- What is printed ---------------------------------------------------------------------------------


def best_of_each(plans, memory):
    """Of each schedule and depth the fastest that fits.

    Args:
        plans: as candidates() returned them; memory: bytes of a device.
    Returns:
        list of Candidate, the fastest first.
    """
    best = {}
    for plan in plans:
        if plan.memory <= memory:
            best.setdefault((plan.schedule, plan.depth), plan)
    return list(best.values())


def format_pipelines(plans, name, batch, hardware, memory):
    """The plan as lines to print.

    Args:
        plans: as best_of_each() returned them; name: of the model; batch: B; hardware: Hardware; memory: bytes.
    Returns:
        str of several lines.
    Raises:
        UserError: nothing fits.
    """
    if not plans:
        raise UserError(
            f"no pipeline of {name} fits {memory / GB:g} GB on a device with {batch} rows: give more devices, or "
            "shorter rows"
        )
    head = ["schedule", "stages", "copies", "micro-batch", "micro-batches", "g", "recompute"]
    table = [[*head, "rows/s", "of best", "s/batch", "idle", "GB"]]
    for plan in plans[: 1 + RUNNERS_UP]:
        shape = [plan.depth, plan.width, plan.rows, plan.micro_batches, f"{plan.micro_batches / plan.depth:g}"]
        speed = [f"{plan.rows_per_second:,.1f}", f"{plan.rows_per_second / plans[0].rows_per_second:.2f}"]
        rest = [f"{plan.seconds:.3g}", f"{plan.idle:.0%}", f"{plan.memory / GB:.2f}"]
        table.append([plan.schedule, *shape, "yes" if plan.recompute else "no", *speed, *rest])
    devices = plans[0].depth * plans[0].width
    per_machine = hardware.devices_per_machine
    return "\n".join(
        [
            f"{name}: batches of {batch} rows on {devices} devices of {memory / GB:g} GB, {per_machine} in a machine, "
            f"{hardware.precision}; predicted",
            "(the fastest of each schedule and depth; g: micro-batches for each stage, PipeDream's accumulation;",
            "idle: share of the time in which a stage waits; 2bw's weights are one step older than the others')",
            *aligned(table),
        ]
    )
