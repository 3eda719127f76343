"""A model, a table of hardware, and the planner's candidates for them."""

from transformers import BertConfig

from common.hardware_table import Hardware
from common.memory import Workload
from common.pipeline_plan import candidates

HARDWARE = Hardware(
    devices_per_machine=4, memory=1, flops=1e12, layer_overhead=1e-4, backward_ratio=2.0, near=10.0, far=2.0
)
SHAPE = {"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 256}
CONFIG = BertConfig(**SHAPE, vocab_size=512, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
WORKLOAD = Workload(CONFIG, rows=2, seq_length=32, precision="bf16", head="masked", targets=12, packed=True)
V100 = "configs/hardware/p3.16xlarge.yaml"


def found(schedule, depth, rows, recompute, devices=8, batch=64, hardware=HARDWARE, neighbours="copies"):
    """The one candidate of a shape."""
    shape = schedule, depth, rows, recompute
    plans = candidates(WORKLOAD, hardware, devices, batch, neighbours=neighbours)
    (plan,) = [plan for plan in plans if (plan.schedule, plan.depth, plan.rows, plan.recompute) == shape]
    return plan
