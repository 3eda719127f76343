"""What the processes of a run agree on: who they are, results of the main process, faults, the seed of dropout."""

import hashlib

import torch
import torch.distributed as dist

from common.errors import UserError, limit_reached
from common.parallel.launch import restarts
from common.parallel.watch import stop_watch


def meet_again(backend):
    """Form the group of processes that torchrun has started once more. Every process calls it.

    Between two starts torchrun may keep its store, and in it the addresses of processes that are gone, which the new
    ones would try to reach; so each start has names of its own there.

    Args:
        backend: "gloo" or "nccl".
    """
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"restart_{restarts()[0]}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def data_rank(accelerator):
    """(rank, ranks) among the processes that read different rows."""
    return accelerator.data_rank


def start_tracker(accelerator, folder, project, run_name, settings):
    """Start the tracker that make_accelerator was given, if any; its local files go below `folder`.

    Args:
        folder: Path of the run; project, run_name: str; settings: flat dict of plain values.
    """
    accelerator.project_configuration.project_dir = str(folder)
    accelerator.project_configuration.logging_dir = str(folder / "tracker")
    kwargs = {"wandb": {"name": run_name, "dir": str(folder)}}
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in settings.items()}
    accelerator.init_trackers(project, config=plain, init_kwargs=kwargs)


def agree_max(accelerator):
    """A function that takes the element-wise maximum of a list of floats over all processes, on the CPU.

    The group is gloo's, so that a reading of the clock never waits for the device's queue. Where batches follow each
    other without a flush, what others than the main process say counts a call later.
    """
    if accelerator.num_processes == 1:
        return list
    group = dist.new_group(backend="gloo")
    if accelerator.steps_behind:
        return _LateMaximum(group)

    def reduce(values):
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
        return tensor.tolist()

    return reduce


class _LateMaximum:
    """As agree_max; the main process, whose stage is ahead of the others', waits for what they said a call before.

    To wait for what they say now would be a flush.

    Args:
        group: of all processes.
    """

    def __init__(self, group):
        self._group, self._said = group, None  # work and tensor of the last call

    def __call__(self, values):
        own, is_main = torch.tensor(values, dtype=torch.float64), dist.get_rank() == 0
        told = own.clone()
        if is_main and self._said:
            self._said[0].wait()
            told = torch.maximum(own, self._said[1])
        telling = dist.broadcast(told, 0, group=self._group, async_op=True)
        if not is_main:
            telling.wait()
        self._said = dist.all_reduce(own, op=dist.ReduceOp.MAX, group=self._group, async_op=True), own
        return told.tolist()


def on_main(accelerator, function):
    """Call a function on the main process; every process gets its result, or its UserError.

    Args:
        function: without arguments; its result can be pickled.
    """
    result, fault = None, None
    if accelerator.is_main_process:
        try:
            result = function()
        except UserError as error:
            fault = str(error)
        except OSError as error:
            fault = limit_reached(error)
            if fault is None:
                raise
    if accelerator.num_processes > 1:
        box = [(result, fault)]
        dist.broadcast_object_list(box, src=0)
        result, fault = box[0]
    if fault:
        raise UserError(fault)
    return result


def raise_together(accelerator, function):
    """Call a function on every process; a UserError of one is raised by all, so that none waits for it.

    Args:
        function: without arguments and result.
    """
    fault = None
    try:
        function()
    except UserError as error:
        fault = str(error)
    faults = [fault]
    if accelerator.num_processes > 1:
        faults = [None] * accelerator.num_processes
        dist.all_gather_object(faults, fault)
    fault = next((fault for fault in faults if fault), None)
    if fault:
        raise UserError(fault)


def main_first(accelerator, function):
    """Call a function on the main process, then on the others, where it finds what the first call left.

    Args:
        function: takes `first`, whether this is the first call. Its UserError on the main process ends all of them.
    Returns:
        each process's own result.
    """
    results = []
    on_main(accelerator, lambda: results.append(function(first=True)))
    return results[0] if results else function(first=False)


def shut_down(accelerator):
    """End the trackers and leave the process group, so that no process ends with a warning."""
    stop_watch()
    accelerator.end_training()
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_dropout(seed, step, micro_batch):
    """Make the dropout of a micro-batch a function of its place in the run, not of what was drawn before.

    Args:
        seed, step, micro_batch: int; micro_batch counts over the whole global batch, whoever computes it.
    """
    torch.manual_seed(derive_seed(seed, step, micro_batch))


def derive_seed(*numbers):
    """An int of 63 bits that depends on all of the numbers, and on their order."""
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
