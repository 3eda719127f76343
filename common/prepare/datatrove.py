"""Shards by datatrove's executors, which bring Slurm, Ray and retries; needs `pip install datatrove`.

    from datatrove.executor import SlurmPipelineExecutor
    from common.prepare.datatrove import TokenizeShard

    flags = ["--input", "pile", "--output_dir", "pile_tokens", "--tokenizer_name", "bert-base-uncased"]
    SlurmPipelineExecutor([TokenizeShard(flags)], tasks=30, time="12:00:00", partition="cpu", cpus_per_task=16).run()

and then `python prepare_pile_data.py merge --num_shards 30` with the same flags.
"""

import subprocess
import sys
from pathlib import Path

from datatrove.pipeline.base import PipelineStep

SCRIPT = Path(__file__).resolve().parents[2] / "prepare_pile_data.py"


class TokenizeShard(PipelineStep):
    """A step without input and output: its task number N tokenizes shard N of as many as there are tasks.

    Args:
        flags: of prepare_pile_data.py, without those that choose a shard.
    """

    type, name = "tokenize", "a shard to token files"

    def __init__(self, flags):
        super().__init__()
        self.flags = [str(flag) for flag in flags]

    def run(self, data=None, rank=0, world_size=1):
        """Tokenize shard `rank` of `world_size`. Raises: subprocess.CalledProcessError: its log says why."""
        shard = ["--num_shards", str(world_size), "--shard_index", str(rank)]
        subprocess.run([sys.executable, SCRIPT, "tokenize", *shard, *self.flags], check=True)
        return data
