"""Our forward pass against stock transformers: same loss, same gradient, nothing seen across documents."""

import re
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForMaskedLM,
    BertForMaskedLM,
)

from common.arguments import DataArguments, ModelArguments
from common.errors import UserError
from common.models.attention import MASKS, plain_attention, same_document_mask
from common.models.attention_choice import AttentionTrial, choose_attention
from common.models.cross_entropy import linear_cross_entropy
from common.models.layers import use_attention
from common.models.mlm import build_mlm_model

VOCABULARY = 300
B, S = 6, 24
SHAPE = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
FAMILIES = ["post-ln", "pre-ln", "roberta", "albert", "deberta", "deberta-v2", "modernbert"]


class Tokenizer:
    pad_token_id = 0

    def get_vocab(self):
        return {str(token): token for token in range(VOCABULARY)}


def build(mode="post-ln", attention="sdpa", packing="documents", **changes):
    kind = {"encoder_ln_mode": mode} if mode.endswith("-ln") else {"model_type": mode}
    model_args = ModelArguments(**kind, **{**SHAPE, **changes})
    torch.manual_seed(0)
    model = build_mlm_model(model_args, DataArguments(max_seq_length=S, packing=packing), Tokenizer())
    use_attention(model, attention)
    return model


def packed_batch():
    """Rows of three documents and padding, with targets in all of them, one of weight 0."""
    generator = torch.Generator().manual_seed(1)
    bounds = [(0, 9), (9, 14), (14, 21)]
    ids = torch.randint(5, VOCABULARY, (B, S), generator=generator)
    documents, positions = torch.zeros(B, S, dtype=torch.long), torch.zeros(B, S, dtype=torch.long)
    for number, (start, end) in enumerate(bounds, 1):
        documents[:, start:end], positions[:, start:end] = number, torch.arange(end - start)
    ids[:, 21:] = 0
    places = torch.tensor([[1, 7, 10, 15, 20]]).repeat(B, 1)
    weights = torch.ones(B, 5)
    weights[2, 4] = 0
    labels = torch.randint(5, VOCABULARY, (B, 5), generator=generator)
    batch = {"input_ids": ids, "position_ids": positions, "document_ids": documents, "masked_positions": places}
    batch |= {"masked_labels": labels, "masked_weights": weights, "loss_denominator": weights.sum()}
    return SimpleNamespace(batch=batch, bounds=bounds)


def stock_loss(model, packed):
    """Each document on its own through stock transformers, padded to the longest, mean over targets."""
    longest = max(end - start for start, end in packed.bounds)
    total = count = 0
    batch = packed.batch
    for start, end in packed.bounds:
        ids, mask = torch.zeros(B, longest, dtype=torch.long), torch.zeros(B, longest, dtype=torch.long)
        ids[:, : end - start], mask[:, : end - start] = batch["input_ids"][:, start:end], 1
        logits = model(input_ids=ids, attention_mask=mask).logits
        for column, place in enumerate(batch["masked_positions"][0].tolist()):
            if start <= place < end:
                losses = torch.nn.functional.cross_entropy(
                    logits[:, place - start], batch["masked_labels"][:, column], reduction="none"
                )
                total = total + (losses * batch["masked_weights"][:, column]).sum()
                count = count + batch["masked_weights"][:, column].sum()
    return total / count


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def relative_difference(mine, theirs):
    """Of gradients by name: the norm of what differs, over that of theirs."""
    assert mine.keys() == theirs.keys()
    difference = sum(((mine[name] - theirs[name]) ** 2).sum() for name in mine).sqrt()
    return float(difference / sum((theirs[name] ** 2).sum() for name in theirs).sqrt())


@pytest.mark.parametrize("mode", FAMILIES)
@pytest.mark.parametrize("attention", ["plain", "sdpa"])
def test_loss_and_gradient_equal_stock_transformers(mode, attention, tmp_path):
    ours = build(mode, attention).train()
    ours.save_pretrained(tmp_path)
    stock, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    packed = packed_batch()
    loss = ours(**packed.batch).loss
    expected = stock_loss(stock.train(), packed)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    assert relative_difference(gradients(ours), gradients(stock)) < 1e-5


# Existing models that are not as those we start from random weights.
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
EXISTING = {
    "bert": ("bert", {}),
    "megatron-bert": ("megatron-bert", {}),
    "roberta": ("roberta", {"type_vocab_size": 1}),
    "albert": ("albert", {"embedding_size": 16, "num_hidden_groups": 2}),
    "deberta, its own head": ("deberta", {**RELATIVE, "legacy": False, "position_biased_input": False}),
    "deberta, far positions": ("deberta", {**RELATIVE, "max_relative_positions": 4, "type_vocab_size": 2}),
    "deberta, contents to positions": ("deberta", {"relative_attention": True, "pos_att_type": ["c2p"]}),
    "deberta, no relative positions": ("deberta", {}),
    "deberta-v2, its own head": ("deberta-v2", {**RELATIVE, "legacy": False, "share_att_key": True}),
    "deberta-v2, buckets": (
        "deberta-v2",
        {**RELATIVE, "position_buckets": 4, "max_relative_positions": 12, "norm_rel_ebd": "layer_norm"},
    ),
    "deberta-v2, convolution": ("deberta-v2", {**RELATIVE, "conv_kernel_size": 3, "conv_act": "gelu"}),
    "modernbert, biases": ("modernbert", {**NO_TOKENS, "attention_bias": True, "mlp_bias": True, "norm_bias": True}),
    "modernbert, a window": ("modernbert", {**NO_TOKENS, "local_attention": 6, "num_hidden_layers": 3}),
    "modernbert, the window last": ("modernbert", {**NO_TOKENS, "local_attention": 2}),
    "deberta-v2, positions to contents": ("deberta-v2", {"relative_attention": True, "pos_att_type": ["p2c"]}),
}


@pytest.mark.parametrize("name", EXISTING)
def test_existing_weights_give_the_loss_and_gradient_of_stock_transformers(name, tmp_path):
    family, changes = EXISTING[name]
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0}
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, **{**SHAPE, **still, **changes})
    torch.manual_seed(0)
    stock = AutoModelForMaskedLM.from_config(config).train()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # nothing is zero that training would move
    stock.save_pretrained(tmp_path)
    model_args = ModelArguments(model_name_or_path=str(tmp_path))
    ours = build_mlm_model(model_args, DataArguments(max_seq_length=S), Tokenizer()).train()
    packed = packed_batch()
    loss, expected = ours(**packed.batch).loss, stock_loss(stock, packed)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    assert ours.num_parameters() == stock.num_parameters()
    heads = {
        "lm_predictions.lm_head.bias": "cls.predictions.bias",
        "lm_predictions.lm_head": "cls.predictions.transform",
    }
    theirs = {}
    for name, gradient in gradients(stock).items():
        old = next((old for old in heads if name.startswith(old)), "")
        theirs[heads.get(old, "") + name.removeprefix(old)] = gradient
    assert relative_difference(gradients(ours), theirs) < 1e-5


@pytest.mark.parametrize("mode", FAMILIES)
def test_a_document_does_not_see_its_neighbours(mode):
    model = build(mode).eval()
    packed = packed_batch()
    with torch.no_grad():
        before = model(**packed.batch).losses
        packed.batch["input_ids"][:, 9:14] = 7  # the middle document, and nothing else
        after = model(**packed.batch).losses
    in_middle = (packed.batch["masked_positions"] >= 9) & (packed.batch["masked_positions"] < 14)
    assert torch.equal(before[~in_middle], after[~in_middle]) and (before[in_middle] != after[in_middle]).all()


def test_concatenated_rows_see_everything():
    model = build(packing="concat").eval()
    packed = packed_batch()
    with torch.no_grad():
        before = model(**packed.batch).losses
        packed.batch["input_ids"][:, 9:14] = 7
        assert (model(**packed.batch).losses != before).all()


@pytest.mark.parametrize("mode", FAMILIES)
def test_both_paths_in_bf16_are_near_fp32(mode):
    packed = packed_batch()
    exact = build(mode, attention="sdpa").train()(**packed.batch).loss.item()
    errors = {}
    for attention in ("plain", "sdpa"):
        with torch.autocast("cpu", torch.bfloat16):
            errors[attention] = abs(build(mode, attention=attention).train()(**packed.batch).loss.item() - exact)
    assert errors["plain"] < max(2 * errors["sdpa"], 1e-3) and max(errors.values()) < 0.02


def test_accuracy_counts_what_is_right():
    model = build().eval()
    packed = packed_batch()
    stock = BertForMaskedLM(model.config).eval()
    stock.load_state_dict(model.state_dict())
    documents = packed.batch["document_ids"]
    with torch.no_grad():
        logits = stock(
            packed.batch["input_ids"],
            position_ids=packed.batch["position_ids"],
            attention_mask=documents[:, None, :, None] == documents[:, None, None],
        ).logits
        best = logits.argmax(-1).gather(1, packed.batch["masked_positions"])
        packed.batch["masked_labels"][:, :2] = best[:, :2]
        correct = model(**packed.batch).correct
    assert correct[:, :2].all() and torch.equal(correct, best == packed.batch["masked_labels"])


def test_vocabulary_and_positions():
    assert build().config.vocab_size == 320 and build(vocab_size=300).config.vocab_size == 300
    assert build().config.max_position_embeddings == 512 and build(max_position_embeddings=24).config.vocab_size == 320
    with pytest.raises(UserError, match="--vocab_size 299"):
        build(vocab_size=299)


@pytest.fixture
def patch_path(monkeypatch):
    """A function that puts a path into the interface, under a name that is there or a new one."""

    def patch(name, path):
        monkeypatch.setitem(AttentionInterface._global_mapping, name, path)
        monkeypatch.setitem(MASKS, name, MASKS.get(name, same_document_mask))

    return patch


def trial_shape(packed=True):
    """What follows the accelerator of an AttentionTrial: the small model, rows of S, two counts of targets."""
    return build().config, 5, S, [4, 10], packed, False


def accelerator_stub(mixed_precision="no"):
    return SimpleNamespace(device=torch.device("cpu"), mixed_precision=mixed_precision)


@pytest.mark.parametrize("slow", ["sdpa", "plain"])
def test_the_attention_path_is_the_faster_one(patch_path, slow):
    """What is chosen is what was measured: a path that is made to wait is not taken."""
    path = AttentionInterface()[slow]

    def waiting(*args, **kwargs):
        time.sleep(0.05)
        return path(*args, **kwargs)

    patch_path(slow, waiting)
    trial = AttentionTrial(accelerator_stub(), *trial_shape())
    chosen, seconds, faults = trial.fastest(trial.candidates())
    assert chosen != slow and seconds[slow] > 0.05 and set(seconds) == {"sdpa", "plain"} and not faults


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_right_attention_passes_the_comparison(precision, packed):
    trial = AttentionTrial(accelerator_stub(precision), *trial_shape(packed))
    assert trial.fault("sdpa") is None


def blind_to_documents(module, query, key, value, mask, **kwargs):
    return plain_attention(module, query, key, value, None, **kwargs)


def wrong_for_some(module, query, key, value, mask, **kwargs):
    if query.shape[2] != key.shape[2]:  # the last layer's
        query = query.flip(2)
    return plain_attention(module, query, key, value, mask, **kwargs)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.01 * gradient


def wrong_gradient(module, query, key, value, mask, **kwargs):
    return plain_attention(module, query, WrongGradient.apply(key), value, mask, **kwargs)


def not_a_number(module, query, key, value, mask, **kwargs):
    output, _ = plain_attention(module, query, key, value, mask, **kwargs)
    return output * float("nan"), None


def failing(*_, **__):
    raise RuntimeError("no kernel for heads of 16\nand more")


@pytest.mark.parametrize(
    "path, fault",
    [
        (blind_to_documents, "differs from plain attention by .e.* for all positions"),
        (wrong_for_some, "differs from plain attention by .e.* for 4 positions of a row"),
        (wrong_gradient, "differs from plain attention by 1e-02 for all positions"),
        (not_a_number, "differs from plain attention by nan for all positions"),
        (failing, r"cannot run here \(RuntimeError: no kernel for heads of 16\)$"),
    ],
)
def test_wrong_attention_is_left_out_and_that_is_said(monkeypatch, patch_path, path, fault):
    """Though it would be the fastest: it is not even measured."""
    patch_path("wrong", path)
    monkeypatch.setattr(AttentionTrial, "candidates", lambda _: ["sdpa", "wrong", "plain"])
    lines = []
    chosen = choose_attention(accelerator_stub(), trial_shape(), "auto", None, lines.append)
    assert chosen in ("sdpa", "plain")
    assert len(lines) == 2 and re.match(f"attention: wrong is left out, it {fault}", lines[0]), lines
    assert lines[1].startswith(f"attention: {chosen} (forward and backward: sdpa ") and "wrong" not in lines[1]


@pytest.mark.parametrize(
    "mode, attention, compiled",
    [
        ("post-ln", "sdpa", False),
        ("post-ln", "flex_attention", False),
        ("pre-ln", "flex_attention", False),
        ("post-ln", "flex_attention", True),
        pytest.param("pre-ln", "flex_attention", True, marks=pytest.mark.exhaustive),
    ],
)
def test_evaluation_is_the_same_by_every_path(mode, attention, compiled):
    """Targets in three documents and in the padding; torch trains by flex_attention on CUDA alone."""
    batch = packed_batch().batch
    batch["masked_positions"][:, 3] = S - 2
    expected = build(mode, "plain").eval()
    model = build(mode, attention).eval()
    if compiled:
        # as one graph, with the mask in it; the compiler's own kernels for CPUs refuse such a mask
        model.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        plain, other = expected(**batch), model(**batch)
    assert other.loss.item() == pytest.approx(plain.loss.item(), abs=1e-5)
    torch.testing.assert_close(other.losses, plain.losses, atol=1e-5, rtol=0)


def test_flex_attention_equals_plain_attention_at_every_position():
    """All positions, padding among them, and some of them in any order."""
    documents = packed_batch().batch["document_ids"]
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(B, 2, S, 16, generator=generator) for _ in range(3))
    some = torch.rand(B, S, generator=generator).argsort(dim=1)[:, :7]
    of_some = query.gather(2, some[:, None, :, None].expand(-1, 2, -1, 16))
    for queries, wanted in ((query, None), (of_some, some)):
        outputs = {}
        for name in ("plain", "sdpa", "flex_attention"):
            inputs = queries, key, value, MASKS[name](documents, torch.float32, wanted)
            path, module = AttentionInterface()[name], torch.nn.Identity()
            outputs[name], _ = path(module, *inputs, scaling=0.25, dropout=0.0, is_causal=False)
        for name in ("sdpa", "flex_attention"):
            torch.testing.assert_close(outputs[name], outputs["plain"], atol=1e-5, rtol=0)


def test_what_a_checkpoint_was_trained_with_is_kept_where_it_runs():
    lines = []
    for saved in ("plain", "sdpa"):
        assert choose_attention(accelerator_stub(), trial_shape(), "auto", saved, lines.append) == saved
    assert not lines
    chosen = choose_attention(accelerator_stub(), trial_shape(), "auto", "flex_attention", lines.append)
    assert chosen in ("sdpa", "plain") and len(lines) == 2
    assert lines[0].startswith("attention: flex_attention, which the checkpoint was trained with, cannot run here (")
    assert "does not support backward on CPU" in lines[0] and lines[0].endswith(": measuring again")
    with pytest.raises(UserError, match="--attn_implementation flex_attention cannot run here"):
        choose_attention(accelerator_stub(), trial_shape(), "flex_attention", None, lines.append)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cross_entropy_equals_the_plain_one(dtype):
    generator = torch.Generator().manual_seed(3)
    hidden, weight, bias = (
        torch.randn(size, generator=generator, dtype=dtype) for size in ((40, 16), (97, 16), (97,))
    )
    labels = torch.randint(97, (40,), generator=generator)
    weights = torch.rand(40, generator=generator)
    weights[3] = 0
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    ours = linear_cross_entropy(*inputs, labels, weights)
    losses = torch.nn.functional.cross_entropy((hidden @ weight.T + bias).float(), labels, reduction="none")
    plain = (losses * weights).sum()
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    for mine, theirs in zip(
        torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * plain, inputs), strict=True
    ):
        assert torch.linalg.norm(mine - theirs) / torch.linalg.norm(theirs) < 1e-6


def test_bf16_gradient_is_no_further_from_fp32_than_stock_bf16(tmp_path):
    """The whole gradient, ours under autocast against stock transformers under autocast."""
    ours = build(packing="documents").train()
    ours.save_pretrained(tmp_path)
    stock = AutoModelForMaskedLM.from_pretrained(tmp_path).train()
    packed = packed_batch()

    def gradient(model, loss):
        grads = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([grad.flatten() for grad in grads])

    exact = gradient(ours, ours(**packed.batch).loss)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = ours(**packed.batch).loss, stock_loss(stock, packed)
    errors = [torch.linalg.norm(gradient(*side) - exact) for side in ((ours, mine), (stock, theirs))]
    relative = [f"{error / exact.norm():.2e}" for error in errors]
    print(f"relative error of the bf16 gradient: ours {relative[0]}, stock {relative[1]}")
    assert errors[0] <= 1.1 * errors[1]
