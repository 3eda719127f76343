"""What the YAMLs in a folder would cut over processes, as far as a memory estimate needs it."""

import yaml

CPU = "cpu"


def sharding_configs(folder):
    """The YAMLs of one machine whose strategy cuts the model or its optimizer state, in the order of their names.

    Args:
        folder: Path with accelerate configurations.
    Returns:
        list of (Path, dict with strategy, ranks and offload, as common.memory.Workload takes them).
    """
    found = []
    for path in sorted(folder.glob("*.yaml")):
        config = yaml.safe_load(path.read_text())
        strategy = _strategy(config)
        if strategy and config.get("num_machines", 1) == 1:
            found.append((path, {**strategy, "ranks": config.get("num_processes", 1)}))
    return found


def _strategy(config):
    kind = config.get("distributed_type")
    sliced = config.get("parallelism_config", {}).get("parallelism_config_tp_size", 1) > 1  # has no estimate
    if kind == "FSDP" and not sliced:
        return {"strategy": "fsdp", "offload": bool(config.get("fsdp_config", {}).get("fsdp_offload_params"))}
    options = config.get("deepspeed_config", {})
    if kind == "DEEPSPEED" and options.get("zero_stage"):
        return {"strategy": f"zero{options['zero_stage']}", "offload": options.get("offload_optimizer_device") == CPU}
    return None
