"""How well a run uses its device: FLOPs that the model needs, over what the device can do."""

import resource
import time

import torch

FORMULA = (
    "6·T·(P·(L-1)/L + 2·H²) + 6·M·(P/L - 2·H²) + 12·H·S·(T·(L-1) + M) + 6·M·(H² + H·V): T real tokens, M predicted "
    "ones, P weights of the L layers; of the last layer only keys and values are needed at all T"
)


def flops_needed(config, tokens, targets, seq_length):
    """FLOPs that forward and backward need for these tokens; what is recomputed or padded does not count.

    The loss sees the predicted positions alone: at the others, the last layer needs no more than keys and values.

    Args:
        config: transformers configuration of a BERT-like model.
        tokens: real tokens; targets: predicted ones; seq_length: S.
    Source: 2 FLOPs per weight and token forward, twice that backward (Kaplan et al. 2020, section 2.1), attention
        scores and sums as in Chowdhery et al. 2022, appendix B.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    layer = 4 * width**2 + 2 * width * config.intermediate_size
    keys_and_values = 2 * width**2
    everywhere = (layers - 1) * layer + keys_and_values
    at_targets = layer - keys_and_values + width**2 + width * config.vocab_size
    attention = 12 * width * seq_length * (tokens * (layers - 1) + targets)
    return 6 * tokens * everywhere + 6 * targets * at_targets + attention


def matmul_peak(device, precision, seconds=0.3):
    """Best rate of a square matrix product on this device, in FLOP/s, measured now.

    Args:
        device: torch.device.
        precision: "bf16", "fp16" or "fp32".
        seconds: how long to look for the best.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, dtype=dtype, device=device)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best, end = float("inf"), time.perf_counter() + seconds
    torch.matmul(a, a)
    while best == float("inf") or time.perf_counter() < end:
        synchronize()
        began = time.perf_counter()
        torch.matmul(a, a)
        synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def peak_memory_bytes(device):
    """Most memory that this process has held: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Meter:
    """Speed and utilisation, between two logs and over the run.

    Args:
        config: of the model; batches: the run's TrainBatches, for its shapes and its waiting time.
        device, precision, ranks: what the peak is measured on, and how often it is there.
    """

    def __init__(self, config, batches, device, precision, ranks):
        self.config, self.batches, self.device = config, batches, device
        self.precision, self.ranks = precision, ranks
        self.peak = matmul_peak(device, precision) * ranks
        self._flops = self._tokens = self._seconds = self._waited = 0.0

    def measure(self, steps, tokens, seconds):
        """What the log says of the last steps.

        Args:
            steps: optimizer steps; tokens: real tokens in them, over all processes; seconds: of training.
        Returns:
            dict: tokens_per_second, mfu, data_wait_share, peak_memory_bytes.
        """
        targets = steps * self.batches.global_batch * self.batches.k
        flops = flops_needed(self.config, tokens, targets, self.batches.rows.seq_length)
        waited, self._waited = self.batches.wait_seconds - self._waited, self.batches.wait_seconds
        self._flops, self._tokens, self._seconds = self._flops + flops, self._tokens + tokens, self._seconds + seconds
        return {
            "tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / self.peak,
            "data_wait_share": waited / seconds,
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }

    def totals(self):
        """The same over the whole run since it was started or resumed; None where no step was made.

        The peak is the best of two measurements, at the start and now: a neighbour may have been busy during one.
        """
        self.peak = max(self.peak, matmul_peak(self.device, self.precision) * self.ranks)
        made = self._seconds > 0
        return {
            "tokens_per_second": self._tokens / self._seconds if made else None,
            "mfu": self._flops / self._seconds / self.peak if made else None,
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }
