"""The attention of OPT on a CPU in bf16: plain, with the numbers of the stock model's own."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, OPTConfig

from common.models.causal import PLAIN_UP_TO, attention_path, build_causal_lm, set_attention

ROWS, LENGTH, VOCABULARY = 3, 32, 80
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128}


def gradients(attention, packing, dtype=torch.float32):
    """Every gradient of a tiny OPT, laid end to end, after a forward pass that takes this attention."""
    torch.manual_seed(1)
    config = OPTConfig(vocab_size=VOCABULARY, word_embed_proj_dim=64, dropout=0.0, **SHAPE)
    args = SimpleNamespace(model_name_or_path=None), SimpleNamespace(packing=packing)
    model = build_causal_lm(*args, config, load=None)
    set_attention(model, attention)
    for parameter in model.parameters():  # far from uniform attention
        torch.nn.init.normal_(parameter, std=0.2)
    ids, labels = torch.randint(VOCABULARY, (2, ROWS, LENGTH))
    documents = torch.ones_like(ids)
    if packing == "documents":
        documents[:, LENGTH // 3 :] = 2
        documents[:, -4:] = 0
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = model(ids, positions, documents, labels, torch.ones(ROWS, LENGTH), torch.tensor(ROWS * LENGTH))
    output.loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("packing", ["concat", "documents"])
def test_plain_attention_is_opts_own(packing):
    expected = gradients("sdpa", packing)
    assert (gradients("plain", packing) - expected).norm() <= 1e-5 * expected.norm()
    away = {name: (gradients(name, packing, torch.bfloat16) - expected).norm() for name in ("plain", "sdpa")}
    assert 0 < away["plain"] <= 1.2 * away["sdpa"], away
    assert away["plain"] != away["sdpa"]  # else both took the same path


def test_which_runs_take_it():
    opt = OPTConfig()
    assert attention_path(opt, PLAIN_UP_TO, "bf16", "cpu") == "plain"
    others = [(opt, PLAIN_UP_TO + 1, "bf16", "cpu"), (opt, 128, "fp32", "cpu"), (opt, 128, "bf16", "cuda")]
    for run in [*others, (GPT2Config(), 128, "bf16", "cpu")]:
        assert attention_path(*run) == "sdpa"
