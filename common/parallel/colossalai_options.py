"""What a YAML's role may ask of Colossal-AI, read and judged by name; without importing it, which takes seconds."""

import importlib.metadata
from typing import NamedTuple

from common.errors import UserError

REQUIREMENTS = "requirements-colossalai.txt"
VERSION = "0.5.0"  # whose inner parts are relied upon: another one is refused
FRACTION, SIZE, SCALE = "a number from 0 to 1", "a number from 0 to 4096", "a number from 1 to 4294967296"
RANGES = {FRACTION: (0, 1), SIZE: (0, 4096), SCALE: (1, 2**32)}  # SIZE: millions of numbers in a chunk or a bucket


class Option(NamedTuple):
    """kind: FRACTION, SIZE, SCALE, or words to choose from; default: None where it must be given."""

    kind: str | tuple
    default: float | str | None


CHUNKS = {"min_chunk_size_m": Option(SIZE, 32.0), "search_range_m": Option(SIZE, 32.0)}
PLACEMENTS = {
    "static": {
        "shard_param_frac": Option(FRACTION, 1.0),
        "offload_optim_frac": Option(FRACTION, 0.0),
        "offload_param_frac": Option(FRACTION, 0.0),
    },
    "auto": {
        "warmup_non_model_data_ratio": Option(FRACTION, 0.8),
        "steady_cuda_cap_ratio": Option(FRACTION, 0.9),
    },
}
ZERO = {"reduce_bucket_size_in_m": Option(SIZE, 12.0), "cpu_offload": Option(("no", "yes"), "no")}
ZERO |= {"initial_scale": Option(SCALE, 2.0**32)}  # of the loss in fp16
PLUGINS = {
    "ddp": {},
    "zero1": ZERO,
    "zero2": ZERO,
    "gemini": {"placement_policy": Option(tuple(PLACEMENTS), None), **CHUNKS, "initial_scale": Option(SCALE, 2.0**16)},
}
# What Colossal-AI has beside these and cannot do on today's torch and transformers; see docs/upstream_issues.md.
INSTEAD = {
    "hybrid": "accelerate_configs/tensor_parallel.yaml",
    "pipeline": "accelerate_configs/pipeline_1f1b.yaml",
    "fsdp": "accelerate_configs/fsdp.yaml",
}


def parse_options(words):
    """What follows `colossalai` in a YAML's role, with the defaults of what is not said.

    Args:
        words: list of "name=value", the names as Colossal-AI's plugins have them.
    Returns:
        dict of names to numbers and words, `plugin` among them.
    Raises:
        UserError: a name, a plugin or a value that is unknown, missing, or of another placement.
    """
    given = dict(word.partition("=")[::2] for word in words)
    plugin = given.pop("plugin", "")
    if plugin in INSTEAD:
        raise UserError(
            f"the YAML's plugin={plugin}: Colossal-AI {VERSION} cannot do it on today's torch and transformers: take "
            f"{INSTEAD[plugin]}"
        )
    if plugin not in PLUGINS:
        raise UserError(f"the YAML's role colossalai needs plugin=, one of {', '.join(PLUGINS)}; not '{plugin}'")
    known = dict(PLUGINS[plugin])
    if plugin == "gemini":
        known |= PLACEMENTS.get(given.get("placement_policy"), {})
    if unknown := next((name for name in given if name not in known), None):
        listed = ", ".join(known) or "none"
        raise UserError(
            f"the YAML's {unknown}={given[unknown]} is no option of plugin={plugin} here: known are {listed}"
        )
    options = {name: _value(name, option, given.get(name)) for name, option in known.items()}
    if options.get("offload_param_frac") and (options["offload_optim_frac"], options["shard_param_frac"]) != (1, 1):
        raise UserError(
            "the YAML's offload_param_frac works where offload_optim_frac=1 and shard_param_frac=1: set them, or drop "
            "it"
        )
    return {"plugin": plugin, **options}


def check_installed():
    """Refuse to start without the version that the YAMLs were tested with.

    Raises:
        UserError: Colossal-AI is missing, or it is another version.
    """
    try:
        found = importlib.metadata.version("colossalai")
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found != VERSION:
        state = f"version {found} is installed" if found else "it is not installed"
        raise UserError(
            f"the YAML's role colossalai needs Colossal-AI {VERSION}, and {state}: pip install --no-deps -r "
            f"{REQUIREMENTS}"
        )


def sharding(options):
    """What is cut and offloaded, in the nearest terms of common.memory.Workload.

    Args:
        options: as parse_options.
    Returns:
        dict: strategy, replicas, offload and offload_parameters.
    """
    moves = options.get("placement_policy") == "auto"  # as much as there is no room for
    offload = moves or options.get("cpu_offload") == "yes" or options.get("offload_optim_frac") == 1
    whole = moves or options.get("offload_param_frac") == 1
    strategy = f"colossalai_{options['plugin']}" if options["plugin"].startswith("zero") else options["plugin"]
    return {"strategy": strategy, "replicas": 1, "offload": offload, "offload_parameters": whole}


def _value(name, option, text):
    if text is None and option.default is not None:
        return option.default
    if isinstance(option.kind, tuple):
        if text not in option.kind:
            raise UserError(f"the YAML's {name}={text or ''} is not understood: give one of {', '.join(option.kind)}")
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    least, most = RANGES[option.kind]
    if not least <= value <= most:
        raise UserError(f"the YAML's {name}={text} is not understood: give {option.kind}")
    return value
