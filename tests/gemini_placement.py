"""Run by test_colossalai.py on two processes: what automatic placement moves under a cap, as a line of JSON.

The cap is of the chunks' bytes alone and far below what run_clm.py could be given on a CPU, where a process's own
libraries count: so the accelerator is called as the script calls it, without the script.
"""

import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from transformers import OPTConfig, OPTForCausalLM  # noqa: E402

from common import parallel  # noqa: E402
from common.errors import run_main  # noqa: E402

SHAPE = {"vocab_size": 600, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_attention_heads": 2}
STEPS = 4


def train(cap_gb):
    """A few steps of 8 layers."""
    accelerator = parallel.make_accelerator("bf16")
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(**SHAPE, num_hidden_layers=8, max_position_embeddings=64, dropout=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    parallel.set_batch(accelerator, 4, 1, 1.0)
    parallel.limit_memory(accelerator, cap_gb)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    after = dict(accelerator.states.whole_weights(model.module))
    policy, chunks = model.gemini_manager._placement_policy, model.chunk_manager
    found = {"losses": [], "evicted": 0, "most": 0, "kept": all(before[name].equal(after[name]) for name in before)}
    evict = policy.evict_tensors

    def counted(**options):
        volume, seconds = evict(**options)
        found["evicted"] += volume
        found["most"] = max(found["most"], chunks.total_mem["cuda"] + options["cuda_demand"])
        return volume, seconds

    policy.evict_tensors = counted
    rows = torch.randint(600, (4, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # as a run does that continues where only its validation was owed
        found["judged"] = model(input_ids=rows, labels=rows).loss.item()
    for _ in range(STEPS):
        loss = model(input_ids=rows, labels=rows).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(loss.item())
    if accelerator.is_main_process:
        found["chunks"] = len({chunks.get_chunk(parameter) for parameter in model.parameters()})
        print(json.dumps(found, default=int))  # numpy's among the sizes
    parallel.shut_down(accelerator)
    return 0


if __name__ == "__main__":
    run_main(partial(train, float(sys.argv[1])))
