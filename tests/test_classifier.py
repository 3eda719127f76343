"""The classifiers' forward pass against stock transformers: same loss, same gradient, dropout in the same places."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from common.data.glue import TASKS
from common.models.classifier import FAST, build_classifier
from common.models.layers import use_attention

B, S, VOCABULARY = 6, 24, 300
SHAPE = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
SHAPE |= {"initializer_range": 0.2}  # large, so that attention and dropout show in the loss
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
OF_V3 = {"position_buckets": 4, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
FAMILIES = {
    "bert": {},
    "megatron-bert": {},
    "roberta": {},
    "deberta": RELATIVE,
    "deberta-v2": {**RELATIVE, **OF_V3, "conv_kernel_size": 3, "conv_act": "gelu"},
}


def build(family, task, folder, **changes):
    """Our classifier and the stock one that its saved weights give."""
    shape = SHAPE | FAMILIES[family] | changes
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, pad_token_id=0, **shape)
    config.architectures = None
    config.save_pretrained(folder)
    args = {"model_name_or_path": str(folder), "random_weights": True, "ignore_mismatched_sizes": False}
    torch.manual_seed(0)
    ours = build_classifier(SimpleNamespace(**args, cache_dir=None, trust_remote_code=False), TASKS[task])
    ours.save_pretrained(folder)
    stock, info = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return ours, stock


def padded_batch(task):
    """Rows of several lengths, pairs in some of them."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([24, 9, 17, 5, 24, 3])
    mask = (torch.arange(S) < lengths[:, None]).long()
    ids = torch.randint(5, VOCABULARY, (B, S), generator=generator) * mask
    types = (torch.arange(S) >= lengths[:, None] // 2).long() * mask
    if TASKS[task].labels:
        labels = torch.randint(TASKS[task].num_labels, (B,), generator=generator)
    else:
        labels = torch.rand(B, generator=generator) * 5
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "labels": labels}


def relative_difference(ours, stock):
    mine, theirs = ({name: p.grad for name, p in model.named_parameters()} for model in (ours, stock))
    assert mine.keys() == theirs.keys()
    difference = sum(((mine[name] - theirs[name]) ** 2).sum() for name in mine).sqrt()
    return float(difference / sum((theirs[name] ** 2).sum() for name in theirs).sqrt())


def assert_equal(ours, stock, batch):
    loss, expected = ours(**batch, weights=torch.ones(B)).loss, stock(**batch).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    assert relative_difference(ours, stock) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["plain", "sdpa"])
@pytest.mark.parametrize(("task", "types"), [("mnli", True), ("mnli", False), ("stsb", True)])
def test_loss_and_gradient_equal_stock_transformers(family, attention, task, types, tmp_path):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ours, stock = build(family, task, tmp_path, type_vocab_size=2, **still)
    if family != "roberta":
        assert isinstance(ours, FAST[type(stock)])
        use_attention(ours, attention)
    batch = padded_batch(task)
    if not types:
        del batch["token_type_ids"]
    assert_equal(ours.train(), stock.train(), batch)


@pytest.mark.parametrize("family", ["bert", "megatron-bert", "deberta", "deberta-v2"])
def test_dropout_is_applied_where_stock_transformers_applies_it(family, tmp_path, monkeypatch):
    """With every place's dropout replaced by a factor that its probability decides, the numbers are equal."""
    places = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.3}
    ours, stock = build(family, "mnli", tmp_path, **places)
    use_attention(ours, "plain")

    def factor(values, p=0.5, training=True, inplace=False):
        return values * (1 + p) if training else values

    monkeypatch.setattr(torch.nn.functional, "dropout", factor)
    batch = padded_batch("mnli")
    assert_equal(ours.train(), stock.train(), batch)
    with torch.no_grad():
        trained = ours(**batch, weights=torch.ones(B)).loss
        ours.eval(), stock.eval()
        loss = ours(**batch, weights=torch.ones(B)).loss
        assert loss.item() == pytest.approx(stock(**batch).loss.item(), rel=1e-5)
    assert abs(trained.item() - loss.item()) > 1e-3


def test_recomputed_activations_change_nothing(tmp_path):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ours, stock = build("bert", "mnli", tmp_path, **still)
    ours.gradient_checkpointing_enable()  # as --gradient_checkpointing does
    assert_equal(ours.train(), stock.train(), padded_batch("mnli"))
