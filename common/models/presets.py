"""Named model shapes.

Source: the BERT miniatures (Turc et al. 2019, arXiv:1908.08962, table 1) and BERT base/large (Devlin et al. 2019);
ALBERT (Lan et al. 2020, arXiv:1909.11942, table 1); DeBERTa, v2 and v3 (He et al. 2021, arXiv:2006.03654 and
arXiv:2111.09543) as published; ModernBERT (Warner et al. 2024, arXiv:2412.13663), with the smaller ones of Ettin
(Weller et al. 2025, arXiv:2507.11412); ELECTRA (Clark et al. 2020, arXiv:2003.10555, table 6); Megatron-DeepSpeed's
ds_pretrain_bert.sh, and PipeDream-2BW's two (Narayanan et al. 2021, arXiv:2006.09503, section 5.1); OPT (Zhang et al.
2022, arXiv:2205.01068, table 1).
"""

from common.errors import UserError

HEAD_SIZE = 64

# layers, hidden size; heads and the width of the feed-forward layer where they are not of 64 and four times the hidden
# size
MODEL_SIZES = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}

MEGATRON_SIZES = {"110m": (12, 768), "336m": (24, 1024), "1.3b": (24, 2048), "3.9b": (48, 2560)}
MEGATRON_SIZES |= {"2.2b": (32, 2304, 32), "3.8b": (32, 3072, 32)}  # PipeDream-2BW's
DEVIATION, MEGATRON_DEVIATIONS = 0.02, {"1.3b": 0.013, "3.9b": 0.011}  # of the initial weights
SIZES_BY_TYPE = {
    "bert": MODEL_SIZES,
    "roberta": MODEL_SIZES,
    "albert": MODEL_SIZES | {"xlarge": (24, 2048, 16), "xxlarge": (12, 4096, 64)},
    "deberta": MODEL_SIZES | {"xlarge": (48, 1024, 16)},
    "deberta-v2": {
        "tiny": (2, 128),
        "mini": (4, 256),
        "xsmall": (12, 384),
        "small": (6, 768),
        "base": (12, 768),
        "large": (24, 1024),
        "xlarge": (24, 1536),
        "xxlarge": (48, 1536),
    },
    "modernbert": {
        "tiny": (2, 128, 2, 192),
        "mini": (4, 256, 4, 384),
        "17m": (7, 256, 4, 384),
        "32m": (10, 384, 6, 576),
        "68m": (19, 512, 8, 768),
        "base": (22, 768, 12, 1152),
        "large": (28, 1024, 16, 2624),
    },
    "megatron-bert": MODEL_SIZES | MEGATRON_SIZES,
    "electra": {"tiny": (2, 128), "mini": (4, 256), "small": (12, 256), "base": (12, 768), "large": (24, 1024)},
}
GENERATOR = "generator"  # of an ELECTRA: its folder, module and entry in the configuration of the discriminator
ELECTRA_EMBEDDING = 128  # narrower than the model up to small, and projected
GENERATOR_SIZE, GENERATOR_SIZES = 1 / 4, {"base": 1 / 3}  # of ELECTRA's generator: shares of the discriminator's width

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


def model_shape(
    size,
    num_hidden_layers=None,
    hidden_size=None,
    num_attention_heads=None,
    intermediate_size=None,
    model_type="bert",
):
    """The shape of a preset with free values over it.

    Args:
        size: a name in SIZES_BY_TYPE[model_type].
        num_hidden_layers, hidden_size, num_attention_heads, intermediate_size: int, or None for the preset's (heads
            of 64 and the preset's share of the width, where the width was changed).
    Returns:
        dict with these four names, as a transformers configuration takes them.
    """
    layers, width, heads, feed_forward = (*SIZES_BY_TYPE[model_type][size], None, None)[:4]
    hidden = hidden_size or width
    if heads is None or hidden != width:
        heads = max(1, hidden // HEAD_SIZE)
    return {
        "num_hidden_layers": num_hidden_layers or layers,
        "hidden_size": hidden,
        "num_attention_heads": num_attention_heads or heads,
        "intermediate_size": intermediate_size or (feed_forward or 4 * width) * hidden // width,
    }


def electra_shape(size, discriminator, generator_size=None):
    """What an ELECTRA has beside the shape of its discriminator.

    Args:
        size: a name in SIZES_BY_TYPE["electra"]; discriminator: as model_shape.
        generator_size: width, heads and feed-forward layer of the generator as a share of the discriminator's; None
            for the published one.
    Returns:
        dict: embedding_size, and generator, a dict of what its configuration has of its own.
    Raises:
        UserError: a width that its heads do not divide.
    """
    share = generator_size or GENERATOR_SIZES.get(size, GENERATOR_SIZE)
    names = ("hidden_size", "num_attention_heads", "intermediate_size")
    generator = {name: max(1, round(share * discriminator[name])) for name in names}
    width, heads = generator["hidden_size"], generator["num_attention_heads"]
    if width % heads:
        raise UserError(
            f"--generator_size {share:g} makes a generator that is {width} wide and has {heads} heads, which do not "
            "divide it: give another share, as 0.25 or 0.5"
        )
    narrow = size in ("tiny", "mini", "small")
    return {"embedding_size": ELECTRA_EMBEDDING if narrow else discriminator["hidden_size"], GENERATOR: generator}


def deviation(size):
    """Standard deviation of the initial weights of a preset."""
    return MEGATRON_DEVIATIONS.get(size, DEVIATION)


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
