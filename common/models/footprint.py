"""What a model holds in a step, from its configuration alone: its parameters, and what autograd keeps of its rows.

Nothing is allocated: the parameters are counted on torch's meta device, and a forward pass of a layer of each type and
of one layer more runs on fake tensors, which have shapes and no numbers. So it holds for any architecture, precision
and dropout.

B rows, S sequence length, k predicted positions of a row, H hidden size, V vocabulary.
"""

import copy
from collections import Counter
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from common.hardware import AUTOCAST
from common.models.attention import same_document_mask
from common.models.causal import set_attention
from common.models.families import FAMILIES, judges_tokens
from common.models.layers import make_fast, use_attention
from common.models.presets import feed_forward_size
from common.optimizers import build_optimizer, find_optimizer_class, hidden_matrices
from common.parallel.slicing import narrow_layers, transformer_layers

MOST_QUESTIONS = 10**5  # of an optimizer in a step, for the value of a number
_known = {}  # Footprint by what it was measured for: tracing takes a second


@dataclass(frozen=True)
class Footprint:
    """Sizes of a model, or of one process's part of it, and of what it keeps; pairs are (outside the layers, in each).

    layers: their number; own_layers: those with weights of their own. parameters: numbers, tied ones once.
    largest_layer: numbers in it. output: numbers in the matrix of the head, [V, E]. tied: whether that is the
    embedding's too. matrices: numbers in the hidden matrices; largest_stack: in those of one shape together. kept:
    pair of bytes per row. layer_input: bytes per row. widest: bytes per row of the largest tensor kept. copies: pair
    of bytes of weights kept again, joined or in fewer bits. traced: False where `kept` is the general figure.
    """

    layers: int
    own_layers: int
    parameters: int
    largest_layer: int
    output: int
    tied: bool
    matrices: int
    largest_stack: int
    kept: tuple[int, int]
    layer_input: int
    widest: int
    copies: tuple[int, int]
    traced: bool


def footprint(
    config, seq_length, precision="fp32", head="causal", targets=None, packed=False, attention="sdpa", slices=1
):
    """Measure a model that does not exist.

    Args:
        config: transformers configuration.
        seq_length: S. precision: "fp32", or autocast's "bf16" or "fp16"; "fp8" counts as bf16.
        head: "causal", or "masked" (with k = `targets`), where the head's transformation counts but not its logits.
        packed: whether a mask keeps the documents of a row apart. attention: path in transformers' interface.
        slices: processes that share each layer's matrices, of which this is one.
    Returns:
        Footprint.
    Raises:
        UserError: a model that cannot be sliced so.
    """
    shape = {"precision": precision, "head": head, "targets": targets, "packed": packed, "attention": attention}
    shape["slices"] = slices
    key = (type(config), config.to_json_string(), seq_length, *shape.values())
    if key not in _known:
        _known[key] = _measure(config, seq_length, shape)
    return _known[key]


def _measure(config, seq_length, shape):
    head, targets = shape["head"], shape["targets"]
    count = _count(config, head, shape["slices"])
    try:
        least = len(set(getattr(config, "layer_types", None) or [None]))  # one of each type
        few, more = (_trace(config, layers, seq_length, **shape) for layers in (least, least + 1))
        layer = {name: more[name] - few[name] for name in ("kept", "copies")}
        traced = {name: (few[name] - least * layer[name], layer[name]) for name in layer}  # (outside, in each layer)
        traced |= {"widest": more["widest"], "traced": True}
        if head == "masked":  # the loss is a part of this forward pass, and its gradients are counted apart
            vocabulary = config.vocab_size
            width = count["output"] // vocabulary
            traced["kept"] = traced["kept"][0] - 4 * targets * width, traced["kept"][1]
            traced["copies"] = traced["copies"][0] - 4 * (width + 1) * vocabulary, traced["copies"][1]
    except Exception:  # a forward pass that depends on the numbers fails in as many ways as there are architectures
        traced = _general_figure(config, seq_length, shape["precision"])
    return Footprint(**count, layer_input=4 * seq_length * config.hidden_size, **traced)


def parameter_count(config, head="causal"):
    """How many numbers the model's parameters are, tied ones once.

    Args:
        config: transformers configuration; head: "causal" or "masked".
    """
    return _count(config, head)["parameters"]


def optimizer_state(config, args):
    """How many numbers of 32 bits an optimizer keeps for each number of a causal model: of AdamW 2.

    It makes a step on fake tensors; wherever it asks for a number, to go by it, it is told 1.

    Args:
        config: transformers configuration; args: as common.optimizers.build_optimizer.
    Returns:
        float; None where it cannot be told so.
    Raises:
        UserError: there is no such optimizer.
    """
    find_optimizer_class(args.optimizer_type)
    with FakeTensorMode(), torch.device("cpu"), _AnsweredByOne():
        with no_init_weights():
            model = _build(config, "causal", 1)
        model.tie_weights()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        try:
            optimizer = build_optimizer(model, args, trial=False)
            optimizer.step()
        except Exception:  # of one that goes by more than single numbers, or that the run will refuse
            return None
    kept = {id(leaf): leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, torch.Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values()) / (4 * _numbers(model))


class _AnsweredByOne(TorchDispatchMode):
    """Fake tensors that give 1 where a number is asked for, which they have not."""

    questions = 0

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        if function is not torch.ops.aten._local_scalar_dense.default:
            return function(*args, **(kwargs or {}))
        self.questions += 1
        if self.questions > MOST_QUESTIONS:
            raise RuntimeError("it would go on until a number changes")
        return 1.0 if args[0].is_floating_point() else 1


def _count(config, head, slices=1):
    with torch.device("meta"):
        model = _build(config, head, slices)
    matrices = Counter()
    for matrix in hidden_matrices(model):
        matrices[matrix.shape] += matrix.numel()
    stacks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    output = model.get_output_embeddings().weight
    return {
        "layers": config.num_hidden_layers,
        "own_layers": max(map(len, stacks), default=0),
        "parameters": _numbers(model),
        "largest_layer": max((_numbers(layer) for stack in stacks for layer in stack), default=0),
        "output": output.numel(),
        "tied": output is model.get_input_embeddings().weight,
        "matrices": sum(matrices.values()),
        "largest_stack": max(matrices.values(), default=0),
    }


def _numbers(module):
    return sum(parameter.numel() for parameter in module.parameters())


def _build(config, head, slices):
    if head == "masked":
        model = FAMILIES[config.model_type].model(config)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if slices > 1:
        narrow_layers(model, transformer_layers(model), slices)
    return model


def _trace(config, layers, seq_length, **shape):
    """What a model of that many layers keeps: bytes per row, and those of the widest tensor; copies of weights."""
    config = copy.deepcopy(config)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    config.num_hidden_layers = layers
    config.use_cache = False
    two, three = (_kept_bytes(config, rows, seq_length, **shape) for rows in (2, 3))  # of one, some are not copied
    growth = [after - before for before, after in zip(two, three, strict=True)]
    fixed = sum(size for size, more in zip(two, growth, strict=True) if not more)
    return {"kept": sum(growth), "widest": max(growth), "copies": fixed}


def _kept_bytes(config, rows, seq_length, precision, head, targets, packed, attention, slices):
    """Bytes of every storage that a forward pass in training leaves behind, parameters apart, in their order."""
    kept = {}

    def keep(tensor):
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    autocast = torch.autocast("cpu", AUTOCAST.get(precision), enabled=precision in AUTOCAST)
    with FakeTensorMode(), torch.device("cpu"):
        with no_init_weights():  # some look at the numbers
            model, run = ready_step(config, seq_length, head, targets, packed, attention, slices)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            output = run(rows)
        keep(output[0])
        for parameter in model.parameters():
            kept.pop(parameter.untyped_storage()._cdata, None)
        return [tensor.untyped_storage().nbytes() for tensor in kept.values()]


def ready_step(config, seq_length, head="causal", targets=None, packed=False, attention="sdpa", slices=1):
    """A model as it is trained, and its forward pass on rows without content.

    Args:
        as footprint().
    Returns:
        (model, function of a number of rows): what that returns begins with the loss of a masked model, or with the
        hidden states of a causal one.
    """
    model = _build(config, head, slices).train()
    model.tie_weights()
    if head == "masked":
        make_fast(model)
        use_attention(model, attention)
        model.packs_documents = packed
    else:
        set_attention(model, attention)

    def run(rows):
        ids = (torch.arange(seq_length) % config.vocab_size).repeat(rows, 1)
        if head == "masked":
            one = torch.ones_like(ids)  # all of a row is one document
            some = torch.zeros(rows, targets, dtype=torch.int64)
            batch = {"position_ids": ids, "document_ids": one, "masked_positions": some, "masked_labels": some}
            batch |= {"masked_weights": torch.ones(rows, targets), "loss_denominator": torch.ones(())}
            if judges_tokens(config):
                batch |= {"sampling_keys": some, "token_weights": ids.float(), "token_denominator": torch.ones(())}
            return model(input_ids=ids, **batch)
        batch = {"attention_mask": same_document_mask(ids, torch.float32), "position_ids": ids} if packed else {}
        return model.base_model(input_ids=ids, **batch)

    return model, run


def _general_figure(config, seq_length, precision):
    """For what cannot be traced: 14 tensors as wide as the model in each layer, and 4 as wide as its feed-forward one.

    That is a gated pre-norm layer (norms, query, key, value, attention's output, residuals; gate, its activation, up,
    product) in the precision of the products, with as many experts as a token has.
    """
    size = 2 if precision in AUTOCAST else 4
    wide = feed_forward_size(config) * (getattr(config, "num_experts_per_tok", None) or 1)
    token = size * (14 * config.hidden_size + 4 * wide)
    return {
        "kept": (4 * 4 * seq_length * config.hidden_size, seq_length * token),
        "copies": (0, 0),
        "widest": seq_length * size * wide,
        "traced": False,
    }
