"""The hardware table of a plan: what a device computes, holds and sends, as a YAML that a person can edit."""

from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from common.errors import UserError

PRECISIONS = ("bf16", "fp16", "fp32")
UNKNOWN = ("near", "far")  # what one device, or one machine, cannot measure


@dataclass(frozen=True)
class Hardware:
    """Machines that are all alike.

    devices_per_machine: GPUs, or cores of a CPU, one process on each. memory: GB (1e9 bytes) of a device. flops:
    FLOP/s of a forward pass. layer_overhead: seconds of a layer's forward pass whatever the rows. backward_ratio:
    seconds of a backward pass to those of a forward one. near: GB/s that a device sends to another of its machine;
    far: GB/s that a machine sends to others, for all its devices together; None: unknown. precision: "bf16", "fp32"
    or "fp16", in which PipeDream's stages send 16 bits and ours do not run.
    """

    devices_per_machine: int
    memory: float
    flops: float
    layer_overhead: float
    backward_ratio: float
    near: float | None = None
    far: float | None = None
    precision: str = "bf16"


# What each entry is, in a file that --profile writes
MEANINGS = {
    "devices_per_machine": "GPUs, or cores of a CPU, one process on each",
    "memory": "GB (1e9 bytes) of a device",
    "flops": "FLOP/s of a forward pass",
    "layer_overhead": "seconds of a layer's forward pass whatever the rows",
    "backward_ratio": "seconds of a backward pass to those of a forward one",
    "near": "GB/s that a device sends to another of its machine",
    "far": "GB/s that a machine sends to others, for all its devices together",
    "precision": f"{', '.join(PRECISIONS)}",
}


def read_hardware(path):
    """Read a hardware table.

    Args:
        path: of a YAML file.
    Returns:
        Hardware.
    Raises:
        UserError: no such file, or an entry that is missing, unknown or no number; the message names it.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        remedy = "measure this machine with --profile, or give --hardware configs/hardware/p3.16xlarge.yaml"
        raise UserError(f"hardware table {path} cannot be read: {remedy}") from error
    except yaml.YAMLError as error:
        raise UserError(f"hardware table {path} is no YAML: correct it, or measure it with --profile") from error
    found, known = found if isinstance(found, dict) else {}, [field.name for field in fields(Hardware)]
    if unknown := [name for name in found if name not in known]:
        raise UserError(f"{path}: '{unknown[0]}' is unknown: a hardware table has {', '.join(known)}")
    found = {"near": None, "far": None, "precision": "bf16"} | found
    if missing := [name for name in known if name not in found]:
        raise UserError(f"{path}: {missing[0]} is missing: give {MEANINGS[missing[0]]}")
    for name, value in found.items():
        if name == "precision":
            good, wanted = value in PRECISIONS, f"one of {', '.join(PRECISIONS)}"
        elif value is None and name in UNKNOWN:
            continue
        else:
            number = isinstance(value, int) or isinstance(value, float) and name != "devices_per_machine"
            good = number and not isinstance(value, bool) and float("inf") > value > -(name == "layer_overhead")
            wanted = f"a number above 0, {MEANINGS[name]}"
        if not good:
            raise UserError(f"{path}: {name} {value}: give {wanted}")
    return Hardware(**found)


def write_hardware(hardware, path, measured):
    """Write a hardware table, each entry with what it means.

    Args:
        hardware: Hardware; path: of the file, whose folder is made; measured: a line that says how.
    """
    lines = [f"# {measured}"]
    for name, meaning in MEANINGS.items():
        value = getattr(hardware, name)
        shown = "" if value is None else f"{value:.4g}" if isinstance(value, float) else value
        shown = f"{value:.3e}" if name == "flops" else shown  # YAML's numbers need the point and the sign
        lines.append(f"{name}: {shown}".ljust(32) + f"# {meaning}" + " (could not be measured here)" * (value is None))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
