"""A run one of whose processes raises an error in the middle of its stage: a script with run_pretraining.py's flags.

python tests/failing_stage.py <number of the process> <passes of layers until then> <flags of run_pretraining.py>
"""

import itertools
import os
import sys
from pathlib import Path

from torch.nn.modules.module import register_module_forward_hook
from transformers.models.bert.modeling_bert import BertLayer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.errors import run_main
from run_pretraining import main

passes = itertools.count()


def fail(module, *_):
    if isinstance(module, BertLayer) and next(passes) == wanted:
        raise ValueError("this stage is broken")


if __name__ == "__main__":
    number, wanted = sys.argv.pop(1), int(sys.argv.pop(1))
    if os.environ["RANK"] == number:
        register_module_forward_hook(fail)
    run_main(main)
