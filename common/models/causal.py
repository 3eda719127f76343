"""Causal language models: any stock transformers class, with a loss that never holds the logits of all positions.

B batch, S sequence, H hidden size, V vocabulary.
"""

import copy
import inspect
from functools import partial

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.masking_utils import create_causal_mask

from common.data.tokenizers import vocabulary_size
from common.errors import UserError, first_line
from common.loading import CONFIG_ERRORS, SHAPE_ERRORS, WEIGHTS_ERRORS
from common.models.attention import compute_dtype
from common.models.head_loss import head_loss
from common.models.presets import OPT_SIZES, opt_shape
from common.models.whole import build_whole

BLOCK_SIZE = 1024  # Hugging Face's default, where the model has as many positions
VOCAB_MULTIPLE = 64  # embedding rows: matrix units like round numbers
PROBED_TOKENS, PROBE_TOLERANCE = 8, 1e-4  # of the test whether a head is just a matrix product
PLAIN_UP_TO = 512  # tokens in a row: with 1,024 plain attention was slower, on two cores with AMX


class ChunkedLossMixin:
    """Gives a stock causal language model a forward pass that takes packed rows and returns the loss alone."""

    packs_documents = False  # rows hold several documents that must not see each other
    draws_labels = True  # may take its loss at labels that it draws itself

    def forward(self, input_ids, position_ids, document_ids, labels, weights, loss_denominator, label_keys=None):
        """Loss of a micro-batch.

        Args:
            input_ids, position_ids, document_ids: [B, S] int64.
            labels: [B, S] int64: the next token; weights: [B, S] float32: 1, or 0 where there is none.
            loss_denominator: scalar float32: the summed weight of the global batch over its number of micro-batches,
                so that the mean over micro-batches is the loss of the global batch however it was cut.
            label_keys: [B] int64, where labels are to be drawn, as head_loss.
        Returns:
            common.models.head_loss.HeadLoss.
        """
        mask = self._mask(document_ids)
        output = self.base_model(input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1)
        return head_loss(self, hidden, labels, weights, loss_denominator, label_keys)

    def _mask(self, document_ids):
        if not self.packs_documents and self.config._attn_implementation != "plain":
            return None  # the stock paths know what is causal
        documents = document_ids if self.packs_documents else torch.ones_like(document_ids[:1])
        return earlier_in_document(documents, compute_dtype(document_ids.device))


class OptMixin(ChunkedLossMixin):
    """The same for OPT, which can be cut into stages."""

    def called_layers(self):
        """Its layers."""
        return self.base_model.decoder.layers

    def run_part(self, batch, hidden=None, layers=None):
        """As MaskedPositionsMixin's; batch: what forward takes."""
        decoder, number, positions = self.base_model.decoder, len(self.called_layers()), batch["position_ids"]
        layers = range(number) if layers is None else layers
        if layers.start == 0:
            hidden = decoder.embed_tokens(batch["input_ids"])
            if decoder.project_in is not None:
                hidden = decoder.project_in(hidden)
            hidden = hidden + decoder.embed_positions(None, position_ids=positions)
        context = {"attention_mask": self._mask(batch["document_ids"]), "past_key_values": None}
        context["attention_mask"] = create_causal_mask(self.config, hidden, **context)
        for place in layers:
            hidden = decoder.layers[place](hidden, **context, position_ids=positions, use_cache=False)
        if layers.stop < number:
            return hidden
        for last in filter(None, (decoder.final_layer_norm, decoder.project_out)):
            hidden = last(hidden)
        targets = (batch[name] for name in ("labels", "weights", "loss_denominator"))
        return head_loss(self, hidden.flatten(0, 1), *targets)


def earlier_in_document(document_ids, dtype):
    """What to add to the scores in packed rows, so that positions attend to what precedes them in their document.

    Args:
        document_ids: [B, S], integers, 0 = padding (which attends to padding).
        dtype: of the scores.
    Returns:
        [B, 1, S, S] of dtype: 0 where attended to, the lowest finite number elsewhere.
    """
    other = document_ids[:, :, None] != document_ids[:, None, :]
    other |= torch.ones_like(other[0]).triu(1)
    mask = torch.zeros(other.shape, dtype=dtype, device=other.device)
    return mask.masked_fill_(other, torch.finfo(dtype).min)[:, None]


def attention_path(config, seq_length, precision, device_type):
    """The attention of a run: the stock one, or, for OPT in bf16 on a CPU with short rows, plain_attention.

    There the backward pass of scaled_dot_product_attention makes no use of the matrix units. What other families do
    besides (windows, shared heads, capped scores) plain attention does not.

    Args:
        config: transformers configuration; seq_length: tokens in a row; precision: "fp32", "bf16" ...; device_type:
            "cpu" or "cuda".
    Returns:
        its name in transformers' interface.
    """
    gains = device_type == "cpu" and precision == "bf16" and seq_length <= PLAIN_UP_TO
    return "plain" if gains and config.model_type == "opt" else "sdpa"


def set_attention(model, name):
    """Give a stock causal model the attention that attention_path named; "sdpa" leaves a family the one it has."""
    if name != "sdpa":
        model.config._attn_implementation = name


def causal_config(model_args, data_args):
    """The configuration of a run's model: of existing weights, of a file, or of a family with a size.

    Args:
        model_args, data_args: common.clm_arguments.CausalModelArguments, CausalDataArguments.
    Returns:
        a transformers configuration.
    Raises:
        UserError: it cannot be loaded, has no such setting, or no model can have its values.
    """
    name = model_args.model_name_or_path or model_args.config_name
    hub = {"cache_dir": data_args.cache_dir, "trust_remote_code": data_args.trust_remote_code}
    if name:
        flag = "--model_name_or_path" if model_args.model_name_or_path else "--config_name"
        try:
            config = AutoConfig.from_pretrained(name, **hub)
        except CONFIG_ERRORS as error:
            raise UserError(
                f"{flag} {name} cannot be loaded ({first_line(error)}): give a folder or a name"
            ) from error
    else:
        try:
            shape = opt_shape(model_args.model_size) if model_args.model_size in OPT_SIZES else {}
            config = AutoConfig.for_model(model_args.model_type, **shape)
        except ValueError as error:
            raise UserError(f"--model_type {model_args.model_type} is unknown to transformers: try opt") from error
    if model_args.config_overrides:
        try:
            config.update_from_string(model_args.config_overrides)
        except CONFIG_ERRORS as error:
            fault = f"{first_line(error)}: give name=value,name=value with names of {type(config).__name__}"
            raise UserError(f"--config_overrides {model_args.config_overrides}: {fault}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping and not data_args.trust_remote_code:
        raise UserError(f"a {config.model_type} is no causal language model: give one of those, as opt, gpt2 or llama")
    if model_args.config_overrides:
        try:
            with torch.device("meta"), no_init_weights():
                AutoModelForCausalLM.from_config(config, trust_remote_code=data_args.trust_remote_code)
        except SHAPE_ERRORS as error:
            fault = f"{first_line(error)}: give values that go together"
            raise UserError(f"--config_overrides {model_args.config_overrides}: {fault}") from error
    return config


def row_length(config, block_size):
    """Tokens in a row: what is asked for, or what Hugging Face's run_clm takes.

    Raises:
        UserError: more than the model has positions.
    """
    positions = getattr(config, "max_position_embeddings", None) or BLOCK_SIZE
    if block_size is None:
        return min(BLOCK_SIZE, positions)
    if hasattr(config, "max_position_embeddings") and block_size > positions:
        raise UserError(f"--block_size {block_size} is above the model's {positions} positions: shorten the rows")
    return block_size


def build_causal_lm(model_args, data_args, config, load, build=build_whole):
    """Build the model of a run, with random weights or from existing ones.

    Args:
        model_args, data_args: common.clm_arguments; config: what causal_config returned, with its vocabulary fitted.
        load: what common.parallel.loader returned, or common.parallel.load_shapes; build: what common.parallel.builder
            returned.
    Returns:
        a stock transformers model whose forward is ChunkedLossMixin's; its numbers may come with prepare().
    Raises:
        UserError: weights that cannot be loaded or are not whole, a head that is more than a matrix product, packed
            documents for a model that is not told positions.
    """
    if model_args.model_name_or_path:
        model = _load(load, model_args.model_name_or_path, data_args, config)
    else:
        model = build(partial(AutoModelForCausalLM.from_config, config, dtype=torch.float32))
    stock = type(model)
    if not _head_is_a_product(stock, config):
        raise UserError(f"the head of {stock.__name__} does more than multiply by a matrix: choose another model")
    told = inspect.signature(model.base_model.forward).parameters
    if data_args.packing == "documents" and "position_ids" not in told:
        kind = model.config.model_type
        raise UserError(f"--packing documents: a {kind} is not told positions: choose --packing concat")
    mixin = OptMixin if model.config.model_type == "opt" else ChunkedLossMixin
    model.__class__ = type(stock.__name__, (mixin, stock), {"__module__": __name__})
    model.packs_documents = data_args.packing == "documents"
    return model


def fit_vocabulary(config, tokenizer, model_args, data_args):
    """Settle the model's vocabulary: its weights' or its family's, or that of a tokenizer larger or far smaller.

    Args:
        config: changed in place; tokenizer: None leaves it as it is; model_args, data_args: as causal_config.
    Raises:
        UserError: weights whose embedding knows less than the tokenizer's ids, or whose texts end in another one.
    """
    if tokenizer is None:
        return
    needed = vocabulary_size(tokenizer)
    if model_args.model_name_or_path:
        if needed > config.vocab_size:
            raise UserError(
                f"--tokenizer_name: the tokenizer has {needed} tokens, the weights in {model_args.model_name_or_path} "
                f"know {config.vocab_size}: use their own tokenizer"
            )
        end, ends = tokenizer.eos_token_id, config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        other = data_args.tokenizer_name != model_args.model_name_or_path
        if other and None not in (end, *ends) and end not in ends:
            raise UserError(
                f"--tokenizer_name {data_args.tokenizer_name}: a text ends in id {end}, in those that the weights in "
                f"{model_args.model_name_or_path} know it is {ends[0]}: use their own tokenizer"
            )
        return
    if needed > config.vocab_size or config.vocab_size > 2 * needed:
        config.vocab_size = -(-needed // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))


def _load(load, name, data_args, config):
    try:
        model, info = load(
            AutoModelForCausalLM,
            name,
            config=config,
            dtype=torch.float32,
            cache_dir=data_args.cache_dir,
            trust_remote_code=data_args.trust_remote_code,
        )
    except WEIGHTS_ERRORS as error:
        fault = f"cannot be loaded ({first_line(error)}): is every file of the weights there, and whole?"
        raise UserError(f"--model_name_or_path {name} {fault}") from error
    lost = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if lost:
        raise UserError(
            f"--model_name_or_path {name} lacks {sorted(lost)[0]} ({len(lost)} parts): is it a causal language model?"
        )
    return model


@torch.no_grad()
def _head_is_a_product(stock, config):
    """Whether logits are the last hidden state times the output embedding, and nothing else: tried without layers.

    Args:
        stock: class of the model; config: its configuration.
    """
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size = 0, PROBED_TOKENS
    small.bos_token_id = small.eos_token_id = small.pad_token_id = 0
    if getattr(small, "layer_types", None):
        small.layer_types = []
    with torch.random.fork_rng(devices=[]):
        model, ids = stock(small).eval(), torch.arange(PROBED_TOKENS)[None]
    logits = model(ids, use_cache=False).logits
    product = model.get_output_embeddings()(model.base_model(ids, use_cache=False).last_hidden_state)
    return torch.allclose(logits, product, rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE)
