"""Activations that are computed again instead of being kept (--gradient_checkpointing)."""

from common.errors import UserError


def recompute_layers(model):
    """Let each layer of a transformers model be computed again in the backward pass.

    Raises:
        UserError: a family whose layers transformers cannot recompute.
    """
    if not model.supports_gradient_checkpointing:
        kind = model.config.model_type
        raise UserError(f"--gradient_checkpointing: transformers has none for the layers of {kind}: drop the flag")
    model.gradient_checkpointing_enable()
