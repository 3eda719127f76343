"""How well a run uses its device: FLOPs that the model needs, over what the device can do.

T real tokens, M predicted ones, S tokens in a row, P weights of L layers, H hidden size, V vocabulary.
"""

import resource
import time

import torch

from common.hardware import AUTOCAST
from common.memory_settings import give_back_memory
from common.models.electra import generator_config
from common.models.families import judges_tokens

MASKED_FORMULA = (
    "6·T·(P·(L-1)/L + 2·H²) + 6·M·(P/L - 2·H²) + 12·H·S·(T·(L-1) + M) + 6·M·(H² + H·V): T real tokens, M predicted "
    "ones, P weights of the L layers; of the last layer only keys and values are needed at all T; with DeBERTa's two "
    "position scores 24·H·S; in ModernBERT's local layers S is the window; of ELECTRA the "
    "generator's, and the discriminator's with M = T and V = 1"
)


CAUSAL_FORMULA = "6·T·(P + H·V) + 6·L·H·S·T: T real tokens, P weights of the L layers; attention looks back alone"


def masked_flops(config, tokens, targets, seq_length, layer_passes=3):
    """FLOPs that forward and backward of a masked-language model need; what is padded does not count.

    The loss sees the predicted positions alone: at the others, the last layer needs no more than keys and values.

    Args:
        config: transformers configuration of a BERT-like model.
        tokens: T; targets: M; seq_length: S.
        layer_passes: 3, as a backward pass costs two forward ones; 4 where the layers' forward pass is made again.
    Source: 2 FLOPs per weight and token forward, twice that backward (Kaplan et al. 2020, section 2.1), attention
        scores and sums as in Chowdhery et al. 2022, appendix B.
    """
    if judges_tokens(config):
        of_generator = _at_targets(generator_config(config), tokens, targets, seq_length, layer_passes)
        # the discriminator's every token is a target, with a head of its own
        return of_generator + _at_targets(config, tokens, tokens, seq_length, layer_passes, outputs=1)
    return _at_targets(config, tokens, targets, seq_length, layer_passes)


def _at_targets(config, tokens, targets, seq_length, layer_passes, outputs=None):
    width, layers = config.hidden_size, config.num_hidden_layers
    in_feed_forward = 3 if config.model_type == "modernbert" else 2  # matrices: its gate is one more
    layer = 4 * width**2 + in_feed_forward * width * config.intermediate_size
    keys_and_values = 2 * width**2
    everywhere = (layers - 1) * layer + keys_and_values
    at_targets = layer - keys_and_values
    products = 2 + len(getattr(config, "pos_att_type", None) or ())
    reach = min(seq_length, 2 * getattr(config, "sliding_window", seq_length) + 1)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    *lengths, last = (reach if kind == "sliding_attention" else seq_length for kind in kinds)
    attention = products * width * (tokens * sum(lengths) + targets * last)
    of_words = getattr(config, "embedding_size", width)
    projection = tokens * width * of_words if of_words != width else 0
    head = of_words * (width + config.vocab_size) if outputs is None else width * (width + outputs)
    layers = layer_passes * 2 * (tokens * everywhere + targets * at_targets + attention)
    return layers + 6 * (projection + targets * head)


def causal_flops(model, seq_length):
    """FLOPs that forward and backward of a causal language model need, of any family; see masked_flops.

    Args:
        model: transformers model with an output embedding; seq_length: S.
    Returns:
        function of (rows, real tokens, layer_passes=3) that gives the FLOPs; the rows do not matter.
    """
    config, head = model.config, model.get_output_embeddings().weight
    apart = {id(head), *(id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding))}
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in apart)
    layers = matrices + config.num_hidden_layers * config.hidden_size * seq_length
    of_head = head.numel()
    return lambda _, tokens, layer_passes=3: tokens * (layer_passes * 2 * layers + 6 * of_head)


def matmul_peak(device, precision, seconds=0.1):
    """Best rate of a square matrix product on this device, in FLOP/s, measured now.

    Args:
        device: torch.device.
        precision: "bf16", "fp16", "fp32", or "fp8", whose measure is bf16's: so it compares with a run in bf16.
        seconds: how long to look for the best.
    """
    dtype = AUTOCAST.get(precision, torch.float32)
    size = 8192 if device.type == "cuda" else 256 if dtype is torch.float16 else 1024  # a CPU takes seconds in fp16
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
    return peak_resident_bytes()


def resident_bytes():
    """Bytes of memory that this process holds now, without what it has freed and could use again."""
    give_back_memory()
    return _status("VmRSS") or peak_resident_bytes()


def peak_resident_bytes():
    """Most bytes of memory that this process has held since it began to run its program."""
    # what getrusage says may be the parent's, from before the program was started
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(name):
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))
    except OSError:  # no Linux
        return None


class Meter:
    """Speed and utilisation, between two logs and over the run.

    Args:
        flops: function of rows, real tokens and layer_passes=3, as masked_flops; formula: what it is.
        batches: the run's TrainBatches, for its waiting time.
        device, precision, ranks: what the peak is measured on, and how often it is there.
    """

    def __init__(self, flops, formula, batches, device, precision, ranks):
        self.flops, self.formula, self.batches, self.device = flops, formula, batches, device
        self.precision, self.ranks = precision, ranks
        self.peak = matmul_peak(device, precision) * ranks
        self._waited = 0.0
        self.restart()

    def restart(self):
        """Forget what was measured so far."""
        self._flops = self._tokens = self._rows = self._seconds = 0.0

    def measure(self, rows, tokens, seconds):
        """What the log says of the last steps.

        Args:
            rows, tokens: rows and real tokens in them, over all processes; seconds: of training.
        Returns:
            dict: tokens_per_second, mfu, data_wait_share, peak_memory_bytes.
        """
        flops = self.flops(rows, tokens)
        waited, self._waited = self.batches.wait_seconds - self._waited, self.batches.wait_seconds
        self._flops, self._tokens, self._seconds = self._flops + flops, self._tokens + tokens, self._seconds + seconds
        self._rows += rows
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

    def throughput(self, recomputes):
        """What --throughput_steps reports.

        Args:
            recomputes: whether the layers' forward pass is made twice (gradient checkpointing).
        Returns:
            dict: as totals(), with samples_per_second (rows), model_tflops_per_device (what the model needs) and
            hardware_tflops_per_device (what is computed).
        """
        device_seconds = self._seconds * self.ranks * 1e12
        made = self.flops(self._rows, self._tokens, layer_passes=3 + recomputes)
        return self.totals() | {
            "samples_per_second": self._rows / self._seconds,
            "model_tflops_per_device": self._flops / device_seconds,
            "hardware_tflops_per_device": made / device_seconds,
        }
