"""A script under fp8.yaml on a CPU: torchao rounds to 8 bits as for a card, and multiplies what comes out in fp32.

accelerate launch --config_file accelerate_configs/fp8.yaml tests/fp8_emulated.py run_pretraining.py flags...
"""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.errors import run_main
from common.parallel import fp8, launch


def emulated(recipe):
    """What fp8.recipe returned, with emulated products."""
    recipe.config = replace(recipe.config, emulate=True)
    return recipe


if __name__ == "__main__":
    script, shipped = sys.argv.pop(1), fp8.recipe
    launch.check_fp8 = lambda engine, cpu: None  # it would ask for a card
    fp8.recipe = lambda: emulated(shipped())
    run_main(importlib.import_module(Path(script).stem).main)
