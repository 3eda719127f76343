"""What a YAML, or the launcher that has read it, cuts over processes: as far as a memory estimate needs it."""

import os

import yaml

from common.parallel.colossalai_options import sharding
from common.parallel.launch import launched_engine, launched_role, launched_sizes, parse_role

CPU = "cpu"
# What accelerate's launcher makes of a YAML's keys
VARIABLES = {
    "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "offload_optimizer_device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "fsdp_offload_params": "FSDP_OFFLOAD_PARAMS",
    "parallelism_config_dp_replicate_size": "PARALLELISM_CONFIG_DP_REPLICATE_SIZE",
}


def launched_sharding(pipeline_config=None):
    """What the launcher's environment says of the YAML in force; before make_accelerator, which changes it.

    Args:
        pipeline_config: as common.parallel.launch.launched_pipe.
    Returns:
        dict with strategy, slices, replicas, offload and offload_parameters, as common.memory.Workload takes them.
    """
    options = {key: os.environ.get(name) or None for key, name in VARIABLES.items()}
    role, given = launched_role()
    if role == "colossalai":
        return sharding(given) | {"slices": 1}
    return _sharding(launched_engine(), options) | {"slices": launched_sizes(pipeline_config).slices}


def single_machine_configs(folder):
    """The YAMLs for one machine's GPUs, in the order of their names.

    Args:
        folder: Path with accelerate configurations.
    Returns:
        list of (Path, dict as launched_sharding with `ranks`, processes that read different rows): without those whose
        `role` asks for anything but slices, and those in fp8.
    """
    found = []
    for path in sorted(folder.glob("*.yaml")):
        config = yaml.safe_load(path.read_text())
        roles = [section["role"] for section in config.values() if isinstance(section, dict) and "role" in section]
        role, given = parse_role(roles[0]) if roles else ("default", {})
        of_gpus = role in ("default", "tensor_parallel")
        if not of_gpus or config.get("num_machines", 1) > 1 or config.get("mixed_precision") == "fp8":
            continue
        kind = {"FSDP": "fsdp", "DEEPSPEED": "deepspeed"}.get(config.get("distributed_type"), "plain")
        sections = ("deepspeed_config", "fsdp_config", "parallelism_config")
        options = {key: value for name in sections for key, value in (config.get(name) or {}).items()}
        slices = given.get("size") or int(options.get("parallelism_config_tp_size") or 1)
        ranks = config.get("num_processes", 1) // slices
        found.append((path, _sharding(kind, options) | {"slices": slices, "ranks": ranks}))
    return found


def _sharding(engine, options):
    stage = int(options.get("zero_stage") or 0) if engine == "deepspeed" else 0
    if engine == "fsdp":
        strategy, offload = "fsdp", str(options.get("fsdp_offload_params")).lower() == "true"
        whole = offload
    else:
        strategy = f"zero{stage}" if stage else "ddp"
        offload = bool(stage) and options.get("offload_optimizer_device") == CPU
        whole = stage == 3 and options.get("offload_param_device") == CPU
    replicas = int(options.get("parallelism_config_dp_replicate_size") or 1) if engine == "fsdp" else 1
    return {"strategy": strategy, "replicas": replicas, "offload": offload, "offload_parameters": whole}
