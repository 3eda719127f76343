"""A run whose processes seem to hold more than any cap allows: a script with run_clm.py's flags."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import limit_memory
from common.errors import run_main
from run_clm import main

if __name__ == "__main__":
    limit_memory.peak_resident_bytes = lambda: 10**18
    run_main(main)
