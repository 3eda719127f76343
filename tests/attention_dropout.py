"""What each rank of a tensor parallel launch drops in two layers, as one line of JSON; see test_tensor_parallel.py.

kept: for each layer, of this rank's head, how much of the uniform attention of each position is left
hidden: what leaves the last layer
"""

import json
import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import parallel
from common.models.layers import make_fast, use_attention

accelerator = parallel.make_accelerator("no")
torch.manual_seed(0)
shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
model = BertForMaskedLM(BertConfig(vocab_size=8, attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.5, **shape))
make_fast(model)
use_attention(model, "sdpa")
for layer in model.bert.encoder.layer:
    attention = layer.attention.self
    for linear in (attention.query, attention.value):  # the same attention to all, of the same values
        torch.nn.init.zeros_(linear.weight)
    torch.nn.init.ones_(attention.value.bias)
hidden, kept = torch.randn(2, 16, 32), []
model = accelerator.prepare(model.train())
for layer in model.bert.encoder.layer:
    layer.attention.output.dense.register_forward_pre_hook(
        lambda _, inputs: kept.append(inputs[0][..., 0].flatten().tolist()), prepend=True
    )
parallel.seed_dropout(1, 2, 3)
for layer in model.bert.encoder.layer:
    hidden = layer(hidden)
print(json.dumps({"kept": kept, "hidden": hidden.flatten().tolist()}))
parallel.shut_down(accelerator)
