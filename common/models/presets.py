"""Named model shapes.

Source: the BERT miniatures (Turc et al. 2019, arXiv:1908.08962, table 1) and BERT base/large (Devlin et al. 2019).
"""

HEAD_SIZE = 64

MODEL_SIZES = {  # layers, hidden size; every preset has heads of 64 and a feed-forward layer four times as wide
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}


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
