"""Which attention path a run takes: the one asked for, or the fastest of those that are right on its device.

B batch, A heads, N queries, S sequence, D head size.
"""

import functools
import time

import torch
from transformers import AttentionInterface

from common.errors import UserError, first_line
from common.hardware import AUTOCAST
from common.models.attention import MASKS, same_document_mask
from common.models.families import attention_dropout, has_position_scores

FLEX = "flex_attention"  # made by a compiler for each device and shape, so never taken without a look at what it does
MEASUREMENTS = 4  # of each path; the first one may warm up
MEASURED_ROWS = 8  # on a CPU, where more would take long and tell no more; on any device, for the comparison
CLEARLY = 0.9  # what is this much faster than sdpa is chosen; a smaller difference is noise
# How far a path may be from plain attention in fp32, relative to its norm: some roundings of the precision it has.
BOUNDS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def refuse_attention(name, device_type):
    """Raise UserError where a path that is asked for cannot train. Args: name: as the flag; device_type: "cpu" ..."""
    if name == FLEX and device_type != "cuda":
        raise UserError(
            f"--attn_implementation {FLEX} trains on CUDA alone (torch has no backward pass for it on a CPU): give "
            "auto, plain or sdpa"
        )


def choose_attention(accelerator, shape, asked, saved, say, shorter=()):
    """The path of a run. Called on the main process; the others must be told.

    Args:
        accelerator, shape: as AttentionTrial, the shape as a tuple of what follows there.
        asked: as the flag; saved: what the checkpoint was trained with, None without one.
        say: function that prints.
        shorter: shapes of other rows for which the path must be right, too.
    Returns:
        its name.
    Raises:
        UserError: the one asked for does not work here.
    """
    chosen = saved if asked == "auto" else asked
    if chosen in ("sdpa", "plain"):
        return chosen
    trial = AttentionTrial(accelerator, *shape, [AttentionTrial(accelerator, *other) for other in shorter])
    if chosen:
        if (fault := trial.fault(chosen)) is None:
            return chosen
        if asked != "auto":
            raise UserError(f"--attn_implementation {asked} {fault}: give auto, plain or sdpa")
        say(f"attention: {saved}, which the checkpoint was trained with, {fault}: measuring again")
    name, seconds, faults = trial.fastest(trial.candidates())
    for dropped, fault in faults.items():
        say(f"attention: {dropped} is left out, it {fault}")
    measured = ", ".join(f"{name} {1000 * time:.1f} ms" for name, time in seconds.items())
    say(f"attention: {name} (forward and backward: {measured})")
    return name


class AttentionTrial:
    """The attention of a run's layers, to be tried on its device.

    Args:
        accelerator: for the device and the precision.
        config: of the model; rows: B; seq_length: S; targets: each N for which the last layer has that many queries.
        packed: whether documents in a row must not see each other; compiled: whether the run compiles its model.
        others: trials of other rows, whose faults count, too.
    """

    def __init__(self, accelerator, config, rows, seq_length, targets, packed, compiled, others=()):
        self.device, self.config, self.targets, self.packed = accelerator.device, config, targets, packed
        self.others = others
        on_cpu = self.device.type == "cpu"
        self.compiled = compiled and not on_cpu  # on a CPU that takes minutes, and changes little
        self.rows = min(rows, MEASURED_ROWS) if on_cpu else rows
        self.dtype = AUTOCAST.get(accelerator.mixed_precision, torch.float32)
        self.measured = {}  # layers and masks by the name of the path
        self.random = torch.Generator().manual_seed(0)  # leaves the generators of the run as they are
        head_size = config.hidden_size // config.num_attention_heads
        shape, self.scaling = (self.rows, config.num_attention_heads, seq_length, head_size), head_size**-0.5
        self.inputs = [self._normal(shape).requires_grad_() for _ in range(3)]
        scores = (self.rows, config.num_attention_heads, seq_length, seq_length)
        self.position_scores = self._normal(scores).requires_grad_() if has_position_scores(config) else None
        # 4 to 6 documents in a row, then padding
        place, counts = torch.arange(seq_length), 4 + torch.arange(self.rows)[:, None] % 3
        documents = 1 + place * counts // seq_length
        self.documents = documents.masked_fill(place >= seq_length - seq_length // 8, 0).to(self.device)

    def candidates(self):
        """The paths that may be the fastest here."""
        flex = self.packed and self.device.type == "cuda" and not attention_dropout(self.config)
        flex = flex and self.position_scores is None
        return ["sdpa", "plain", *[FLEX] * flex]

    def fastest(self, names):
        """Measure the paths that are right.

        Args:
            names: of paths, with plain among them.
        Returns:
            (name, seconds, faults): the path to take; what forward and backward of one layer took by each of them;
            what is wrong with those left out.
        """
        faults = {name: fault for name in names if (fault := self.fault(name))}
        seconds = {name: float("inf") for name in names if name not in faults}
        for _ in range(MEASUREMENTS):
            for name in seconds:
                seconds[name] = min(seconds[name], self._time(name))
        name = min(seconds, key=seconds.get)
        if "sdpa" in seconds and seconds[name] >= CLEARLY * seconds["sdpa"]:
            name = "sdpa"
        return name, seconds, faults

    def fault(self, name):
        """What is wrong with a path, in words that can follow its name; None where nothing is.

        Its output and gradients are compared with those of plain attention in fp32, which cannot be wrong.
        """
        if name == "plain":
            return None
        try:
            for targets in (None, *self.targets):
                difference = self._difference(name, targets)
                if not difference <= BOUNDS[self.dtype]:  # or it is no number
                    queries = "all positions" if targets is None else f"{targets} positions of a row"
                    return f"differs from plain attention by {difference:.0e} for {queries}"
            self._time(name)
        except Exception as error:  # compilers and kernels fail in as many ways as there are of them
            return f"cannot run here ({type(error).__name__}: {first_line(error)})"
        return next(filter(None, (other.fault(name) for other in self.others)), None)

    def _normal(self, shape):
        return torch.randn(shape, generator=self.random).to(self.device, self.dtype)

    def _difference(self, name, targets):
        """The largest relative difference among the output and the three gradients."""
        query, key, value = self.inputs
        wanted = None
        if targets is not None:
            wanted = torch.rand(self.documents.shape, generator=self.random).argsort(dim=1)[:, :targets]
            wanted = wanted.to(self.device)
            query = query.detach().gather(2, wanted[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        inputs, upstream = [query.requires_grad_(), key, value], self._normal(query.transpose(1, 2).shape)
        layer = self._layer(name)

        def whole(query, key, value, documents, wanted):  # with the mask inside, as in a compiled model
            return layer(query, key, value, MASKS[name](documents, self.dtype, wanted) if self.packed else None)

        with self._autocast():
            output = self._compile(whole)(*inputs, self.documents, wanted)
        found = [output.detach(), *torch.autograd.grad(output, inputs, upstream)]
        some = slice(MEASURED_ROWS)  # rows know nothing of each other
        exact = [tensor[some].detach().float().requires_grad_() for tensor in inputs]
        mask = None
        if self.packed:
            mask = same_document_mask(self.documents[some], torch.float32, None if wanted is None else wanted[some])
        output = self._layer("plain")(*exact, mask)
        expected = [output.detach(), *torch.autograd.grad(output, exact, upstream[some].float())]
        pairs = zip(found, expected, strict=True)
        return max(float((mine[some].float() - right).norm() / right.norm()) for mine, right in pairs)

    def _layer(self, name):
        path, module = AttentionInterface()[name], torch.nn.Identity()

        def layer(query, key, value, mask):
            return path(module, query, key, value, mask, scaling=self.scaling, dropout=0.0, is_causal=False)[0]

        return layer

    def _compile(self, function):
        compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False, isolate_recompiles=True)
        return compiled(function) if self.compiled else function

    def _autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _time(self, name):
        if name not in self.measured:
            mask = MASKS[name](self.documents, self.dtype) if self.packed else None  # made once for all layers
            self.measured[name] = self._compile(self._layer(name)), mask
        layer, mask = self.measured[name]
        inputs = self.inputs
        if self.position_scores is not None:
            mask, inputs = self.position_scores + (0 if mask is None else mask), [*inputs, self.position_scores]
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        began = time.perf_counter()
        with self._autocast():
            output = layer(*self.inputs, mask)
        torch.autograd.grad(output.sum(), inputs)
        wait()
        return time.perf_counter() - began
