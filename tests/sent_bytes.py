"""A run whose stages remember what they send: a script with run_pretraining.py's flags, under pipeline_2bw.

python tests/sent_bytes.py <file> <flags of run_pretraining.py>

Each process writes <file>.<its number>: how many bytes for each row it has sent at a time, as a JSON list.
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.errors import run_main
from run_pretraining import main

sent, isend = [], dist.isend


def remember(tensor, *args, **options):
    sent.append(tensor.nbytes // len(tensor))
    return isend(tensor, *args, **options)


if __name__ == "__main__":
    path = sys.argv.pop(1)
    dist.isend = remember
    try:
        run_main(main)
    finally:
        Path(f"{path}.{os.environ['RANK']}").write_text(json.dumps(sent))
