"""When the stages of a pipeline compute: what a throughput experiment makes its picture and its figures of."""

import contextlib
import time
from typing import NamedTuple

import torch
import torch.distributed as dist


class Pass(NamedTuple):
    """What a stage has computed for a micro-batch, in seconds since the measuring began.

    kind: forward, backward or update. stage: its number, None of an update, which is of all stages here. micro_batch:
    its number in the run; of an update, that of the last one that it knows.
    """

    kind: str
    stage: int | None
    micro_batch: int
    begin: float
    end: float


class StageTimes:
    """Every pass of a process's stages, from now on.

    Args:
        device: that computes. What is measured is waited for, so a GPU works less ahead than without.
    """

    def __init__(self, device):
        self._device, self._passes = device, []
        dist.barrier()  # so that the clocks of several machines are comparable
        self._began = time.perf_counter()

    @contextlib.contextmanager
    def of(self, kind, stage, micro_batch):
        """Context of one pass. Args: as Pass."""
        begin = self._now()
        yield
        self._passes.append(Pass(kind, stage, micro_batch, begin, self._now()))

    def of_updates(self, runner):
        """Take the updates of a runner's optimizer for passes, too.

        Args:
            runner: whose `newest` is the number of the last micro-batch that an update knows.
        """
        begin = []

        def note(*_):
            self._passes.append(Pass("update", None, runner.newest, begin.pop(), self._now()))

        runner.optimizer.register_step_pre_hook(lambda *_: begin.append(self._now()))
        runner.optimizer.register_step_post_hook(note)

    def gather(self, about):
        """End it. Every process calls it.

        Args:
            about: dict of this process.
        Returns:
            list of dicts by process: about, with seconds (from begin to end) and passes (list of Pass).
        """
        own = {**about, "seconds": self._now(), "passes": self._passes}
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, own)
        return every

    def _now(self):
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - self._began
