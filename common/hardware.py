"""What the processor can do, and what precisions mean."""

import torch

# What autocast computes in; of fp8, everything but the products of its layers.
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def has_bf16(device_type: str) -> bool:
    """Whether the hardware multiplies matrices in bf16; where it does not, torch emulates it tens of times slower.

    Args:
        device_type: "cpu" or "cuda".
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
