"""How much memory a run needs, by parts, before anything is allocated."""

from dataclasses import dataclass, fields

import torch
from transformers import PreTrainedConfig

from common.models.cross_entropy import chunk_size
from common.models.footprint import footprint

GB = 1e9
MOMENTS = {"adamw": 2, "adam": 2, "sgd": 0}  # numbers that an optimizer keeps for each parameter; unknown: as AdamW
ORTHOGONALIZED = 4  # copies of the largest stack of equal matrices while Muon updates it
HEAP_SHARE = 0.1  # of the activations: gaps between them in a CPU's heap; see benchmarks/bench_memory.py
# Of what is computed again: it comes and goes layer by layer, among gradients that stay where it was.
RECOMPUTED_HEAP_SHARE = 0.35


@dataclass(frozen=True)
class Strategy:
    """What is cut over the processes; every number is fp32, in bf16 and fp16 too, which are autocast's.

    zero: DeepSpeed does it. halves: Colossal-AI does it, with weights and gradients in 16 bits where products are.
    chunks: in Gemini's chunks, in which gradients take their weights' place. master_weights: the optimizer has a copy
    of its share of the weights.
    Source: Rajbhandari et al. 2020 (arXiv:1910.02054), section 5.
    """

    optimizer: bool = False
    gradients: bool = False
    parameters: bool = False
    zero: bool = False
    master_weights: bool = False
    halves: bool = False
    chunks: bool = False


STRATEGIES = {
    "ddp": Strategy(),  # a single process too
    "zero1": Strategy(optimizer=True, zero=True, master_weights=True),
    "zero2": Strategy(optimizer=True, gradients=True, zero=True, master_weights=True),
    "fsdp": Strategy(optimizer=True, gradients=True, parameters=True),
    "zero3": Strategy(optimizer=True, gradients=True, parameters=True, zero=True),
    "colossalai_zero1": Strategy(optimizer=True, master_weights=True, halves=True),
    "colossalai_zero2": Strategy(optimizer=True, gradients=True, master_weights=True, halves=True),
    "gemini": Strategy(optimizer=True, gradients=True, parameters=True, master_weights=True, halves=True, chunks=True),
}
CHUNK = 2**25  # numbers in a chunk of Gemini, of the YAMLs; one matrix that is larger has a chunk of its size
COLOSSALAI_BUCKET = 12 * 2**20  # numbers that low-level ZeRO sends at once, its default
BUCKET = 5 * 10**7  # DeepSpeed's reduce_bucket_size, in numbers; its default, ten times that, takes 2 to 4 GB of a GPU
# DeepSpeed's own defaults, in numbers: stage3_max_reuse_distance, from a layer's forward pass to its backward pass and
# so twice what lies behind it; stage3_prefetch_bucket_size; sub_group_size.
REUSE_DISTANCE, PREFETCHED, SUB_GROUP = 10**9, 5 * 10**7, 10**9


@dataclass(frozen=True)
class Workload:
    """What a process is to train.

    config: transformers configuration. rows: in a micro-batch; seq_length: tokens in a row. precision: "fp32", "bf16"
    or "fp16". optimizer_type: as --optimizer_type; state: numbers that it keeps for each parameter, None where the
    type says it. strategy: a name in STRATEGIES;
    slices: processes that share each layer's matrices and the rows (tensor parallelism); ranks: processes that read
    different rows; replicas: groups of them that repeat each other (HSDP); offload: the optimizer in the host's
    memory; offload_parameters: the parameters too. accumulation: micro-batches in a step. head: "causal", or "masked"
    with `targets` predicted positions in a row. packed: a mask keeps the documents of a row apart. attention: path in
    transformers' interface. device: "cpu" or "cuda".
    """

    config: PreTrainedConfig
    rows: int
    seq_length: int
    precision: str = "fp32"
    optimizer_type: str = "adamw"
    state: float | None = None
    strategy: str = "ddp"
    slices: int = 1
    ranks: int = 1
    replicas: int = 1
    offload: bool = False
    offload_parameters: bool = False
    accumulation: int = 1
    gradient_checkpointing: bool = False
    head: str = "causal"
    targets: int | None = None
    packed: bool = False
    attention: str = "sdpa"
    device: str = "cpu"

    @property
    def processes(self):
        """All of them."""
        return self.slices * self.ranks

    def footprint(self):
        """Returns: common.models.footprint.Footprint, the same whatever the rows and the optimizer; None of it is cut.

        Raises:
            UserError: a model that cannot be sliced so.
        """
        shape = (self.config, self.seq_length, self.precision, self.head, self.targets, self.packed, self.attention)
        return footprint(*shape, slices=self.slices)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a process holds on its device at the peak of a step, by parts; each field is a line of the printout.

    Every part is at its own largest; `apart` (zero or less) takes off what is not there at the same time; `buffers`
    are tensors made whole for their turn, and what is sent to other processes; `allocator` is what lies unused between
    blocks. `host`, in the host's memory, is not in the total.
    """

    parameters: int
    gradients: int
    optimizer: int
    update: int
    buffers: int
    activations: int
    logits: int
    libraries: int
    allocator: int
    apart: int
    host: int = 0

    @property
    def total(self):
        """Bytes on the device at the peak."""
        return sum(getattr(self, field.name) for field in fields(self)) - self.host


NAMES = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "update": "optimizer step",
    "buffers": "gathered and sent",
    "activations": "activations",
    "logits": "logits and loss",
    "libraries": "libraries",
    "allocator": "allocator",
    "apart": "not at the same time",
}


def estimate(workload, libraries=0):
    """The peak of a training step after the first, when the optimizer's state is there.

    On a GPU it is the largest of four moments: the loss and the beginning of the backward pass, with all activations;
    its end, with all gradients; the update; and the start, where DeepSpeed holds the whole model before it cuts it.
    Gradients are made as activations go, unless they stay from an earlier micro-batch or in the buckets of data
    parallelism. On a CPU the parts add up: the C library keeps what is freed where it lies
    (common/memory_settings.py), and blocks of other sizes seldom fit there.

    Args:
        workload: Workload.
        libraries: bytes that the process holds before it has a model, by common.utilisation.resident_bytes(); they
            count on a CPU alone.
    Returns:
        MemoryEstimate.
    Raises:
        UserError: a model that cannot be sliced so.
    """
    model = workload.footprint()
    cut, mixed, whole = STRATEGIES[workload.strategy], workload.precision != "fp32", 4 * model.parameters
    on_cpu, several = workload.device == "cpu", workload.accumulation > 1

    def share(size, is_cut=True):
        return -(-size // max(1, workload.ranks // workload.replicas)) if is_cut else size

    # ---- What stays from step to step ---------------------------------------------------------------
    weights = whole // 2 if cut.halves and mixed else whole
    parameters, gradients = share(weights, cut.parameters), share(weights, cut.optimizer)
    in_place = gradients * cut.chunks * (not several)
    gradients -= in_place
    if several and cut.optimizer and not cut.gradients or several and _gathers(workload):
        gradients += weights  # whole until the last micro-batch
    engine_copies = cut.master_weights + (2 - cut.master_weights) * (cut.zero and workload.offload)
    optimizer = share(4 * _moments(workload, model) + engine_copies * whole, cut.optimizer)
    update = share(_update_bytes(workload, model), cut.optimizer)
    if cut.zero:  # the gradients again, end to end
        update += share(4 * min(model.parameters, SUB_GROUP) if cut.parameters else whole)
    host = 0
    if workload.offload:
        update = 0
        if not on_cpu:  # where it is the same memory
            host = optimizer + share(weights) - in_place + parameters * workload.offload_parameters
            optimizer, gradients = 0, gradients - share(weights) + in_place
            parameters *= not workload.offload_parameters

    # ---- What comes and goes ------------------------------------------------------------------------
    # of weights, until the backward pass; of cut ones too
    copies = 0 if cut.halves else model.copies[0] + model.layers * model.copies[1]
    kept = model.kept[0] + model.layers * model.kept[1]
    backward = 2 * model.widest  # gradients of one tensor and of the next
    recomputed = 0
    if workload.gradient_checkpointing:
        kept = model.kept[0] + model.layers * model.layer_input
        backward += model.kept[1]
        recomputed = workload.rows * model.layers * model.kept[1]
    kept, backward = workload.rows * kept + copies, workload.rows * backward
    of_output = 4 * model.output  # the gradient of the head's matrix
    loss, of_hidden = loss_bytes(workload, model, mixed)
    at_loss, at_end, at_update = _buffers(workload, model, mixed)

    parts = {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": optimizer,
        "update": update,
        "buffers": max(at_loss, at_end),
        "activations": kept + backward,
        "logits": loss,
    }
    if on_cpu:
        # a tied embedding's own gradient, which is added to the head's, leaves a gap too
        gaps = int(HEAP_SHARE * parts["activations"] + RECOMPUTED_HEAP_SHARE * recomputed)
        gaps += of_output if model.tied else 0
        # so do, as measured, a model that was whole before its cut (one loaded in parts is not, and needs less)
        # and what comes and goes in it; stage 3 moves its part
        if cut.chunks:
            gaps += whole * 3 // 2 + 2 * parts["buffers"]  # 1 to 2 times the model, measured with three
        elif cut.optimizer:
            gaps += whole + parts["buffers"] + share(whole) * (cut.zero and cut.parameters)
        # in stages 1 and 2 the heap grows in some of the first dozen steps, others in each run, by this size or two:
        # to 0 to 13 times it after 17 steps, as measured with two models; 6 is about the middle
        gaps += 6 * of_output * (cut.zero and not cut.parameters)
        return MemoryEstimate(**parts, libraries=libraries, allocator=gaps, apart=0)
    early = several or workload.ranks > 1 and not cut.optimizer or workload.strategy == "zero3"
    moments = [
        gradients * early + kept + max(loss, of_output + of_hidden + backward) + at_loss,
        gradients + (of_output if model.tied else 0) + at_end,  # the embedding's, before it is added to the head's
        gradients + update + at_update,
        (whole + share(whole)) * cut.zero - parameters - optimizer,  # DeepSpeed cuts the model on the device
    ]
    transient = sum(parts[name] for name in ("gradients", "update", "buffers", "activations", "logits"))
    return MemoryEstimate(**parts, libraries=0, allocator=0, apart=max(moments) - transient, host=host)


def _gathers(workload):
    """Whether fully_shard has the model: it also keeps equal what copies of sliced layers there are."""
    return workload.strategy == "fsdp" or (workload.slices > 1 and workload.ranks > 1)


def _buffers(workload, model, mixed):
    """What a strategy needs for a while: tensors made whole for their turn, and what it sends.

    Returns:
        bytes at the loss, at the end of the backward pass, at the update.
    """
    cut, layer, whole = STRATEGIES[workload.strategy], 4 * model.largest_layer, 4 * model.parameters
    if cut.chunks:
        gathered = 2 * 2 * max(CHUNK, model.output)  # two of them, each in 16 bits
        return gathered, gathered, 0
    if cut.halves:
        return (2 * 4 * COLOSSALAI_BUCKET,) * 3
    if _gathers(workload):
        # whole from the first layer to the end of the backward pass: all but the layers; its gradient, and that laid
        # out to be sent. Of two layers: the weights; of one: where they were gathered, gradients, those to be sent.
        rest = whole - model.layers * layer
        return rest + 5 * layer, 3 * rest, 0
    if not cut.zero:
        return 0, 0, 0
    sent = min(whole, 4 * BUCKET)
    bucket = sent if workload.device == "cpu" else 4 * BUCKET  # a CPU gives memory when it is written to
    if not cut.parameters:
        bucket *= 1 + mixed  # one for what is sent in 16 bits, of 32 too
        return bucket, bucket + sent, 0
    bucket += bucket // 2 * mixed
    gathered = 4 * min(model.parameters, REUSE_DISTANCE // 2 + PREFETCHED + model.largest_layer)
    return bucket + gathered, bucket + sent, bucket


def _moments(workload, model):
    if workload.state is not None:
        return round(workload.state * model.parameters)
    if workload.optimizer_type == "muon":
        return 2 * model.parameters - model.matrices
    return MOMENTS.get(workload.optimizer_type, 2) * model.parameters


def _update_bytes(workload, model):
    if workload.optimizer_type == "muon":
        return ORTHOGONALIZED * 4 * model.largest_stack
    # an optimizer that is not ours may work on all parameters at once, with one intermediate result
    return 0 if workload.optimizer_type in MOMENTS else 4 * model.parameters


def loss_bytes(workload, model, mixed):
    """What common.models.cross_entropy holds for a micro-batch.

    Args:
        workload: Workload; model: its footprint(); mixed: whether products are in 16 bits.
    Returns:
        bytes: (all at once, the gradient of the hidden states in it).
    """
    vocabulary = workload.config.vocab_size
    positions = workload.rows * (workload.targets or workload.seq_length)
    of_hidden = 4 * positions * (model.output // vocabulary)
    chunk = vocabulary * min(positions, chunk_size(vocabulary, torch.bfloat16 if mixed else torch.float32))
    # the logits of a chunk and of the one before it, or in fp32 as well; a CPU takes them to fp32 block by block
    of_logits = (4 if mixed and workload.device == "cpu" else 8) * chunk
    # the gradients; of mixed precision the matrix and a product too
    forward = of_logits + (8 if mixed else 4) * model.output + of_hidden
    return max(forward, 2 * (4 * model.output + of_hidden)), of_hidden


def format_estimate(parts, cap_gb=None):
    """The estimate as lines to print, aligned, in GB of 1e9 bytes; parts that are not there are left out.

    Args:
        parts: MemoryEstimate; cap_gb: GB per process; 0 or None: no cap, no line about it.
    Returns:
        str of several lines.
    """
    lines = [(label, getattr(parts, name)) for name, label in NAMES.items() if getattr(parts, name)]
    lines.append(("total", parts.total))
    lines += [("in the host's memory", parts.host)] if parts.host else []
    lines += [("cap", cap_gb * GB)] if cap_gb else []
    figures = (f"  {label:<21}{number / GB:8.2f} GB" for label, number in lines)
    return "\n".join(["memory of a process at its peak, estimated:", *figures])
