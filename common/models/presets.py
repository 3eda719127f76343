"""Named model shapes.

Source: the BERT miniatures (Turc et al. 2019, arXiv:1908.08962, table 1) and BERT base/large (Devlin et al. 2019); OPT
(Zhang et al. 2022, arXiv:2205.01068, table 1).
"""

from common.errors import UserError

HEAD_SIZE = 64

MODEL_SIZES = {  # layers, hidden size; every preset has heads of 64 and a feed-forward layer four times as wide
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}

OPT_SIZES = {  # layers, hidden size, heads; the feed-forward layer is four times as wide
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "1.3b": (24, 2048, 32),
    "2.7b": (32, 2560, 32),
    "6.7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
    "66b": (64, 9216, 72),
    "175b": (96, 12288, 96),
}
OPT_ALIASES = {"6.7": "6.7b"}
OPT_VOCABULARY, OPT_POSITIONS = 50272, 2048


def model_shape(size, num_hidden_layers=None, hidden_size=None, num_attention_heads=None, intermediate_size=None):
    """The shape of a preset with free values over it.

    Args:
        size: a name in MODEL_SIZES.
        num_hidden_layers, hidden_size, num_attention_heads, intermediate_size: int, or None for the preset's (heads
            of 64 and four times the width, where the width was changed).
    Returns:
        dict with these four names, as a transformers configuration takes them.
    """
    layers, hidden = MODEL_SIZES[size]
    hidden = hidden_size or hidden
    return {
        "num_hidden_layers": num_hidden_layers or layers,
        "hidden_size": hidden,
        "num_attention_heads": num_attention_heads or max(1, hidden // HEAD_SIZE),
        "intermediate_size": intermediate_size or 4 * hidden,
    }


def feed_forward_size(config):
    """The width inside a feed-forward block of a transformers configuration, under whichever name its family has."""
    named = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
    return next(filter(None, named), 4 * config.hidden_size)


def opt_shape(size):
    """The shape of a published OPT model.

    Args:
        size: a name in OPT_SIZES, or an alias of one.
    Returns:
        dict of keyword arguments of transformers.OPTConfig.
    Raises:
        UserError: an unknown size; the message lists the known ones.
    """
    size = OPT_ALIASES.get(size, size)
    if size not in OPT_SIZES:
        raise UserError(f"no OPT model of size '{size}': choose {', '.join(OPT_SIZES)}")
    layers, hidden, heads = OPT_SIZES[size]
    odd = size == "350m"  # norms after the blocks, and word vectors of half the width, which are projected
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "vocab_size": OPT_VOCABULARY,
        "max_position_embeddings": OPT_POSITIONS,
        "word_embed_proj_dim": hidden // 2 if odd else hidden,
        "do_layer_norm_before": not odd,
    }
