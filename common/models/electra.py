"""ELECTRA: a small generator fills in the masked tokens, and a discriminator finds the tokens that it has replaced.

Both are stock transformers classes. They share their embeddings, and the generator's output is tied to them, too; only
the discriminator goes on to other tasks. Source: Clark et al. 2020 (arXiv:2003.10555), section 3; that the norm behind
the embeddings is shared is as in its authors' code.

B rows, S tokens in a row, k masked positions in a row, N positions, H hidden size, V vocabulary.
"""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoConfig, ElectraForMaskedLM, ElectraForPreTraining

from common.errors import UserError
from common.models.head_loss import HeadLoss, head_loss
from common.models.presets import GENERATOR, GENERATOR_SIZE, electra_shape
from common.models.sampling import sample_tokens

GENERATOR_WEIGHT, DISCRIMINATOR_WEIGHT = 1.0, 50.0  # of the losses (section 3.2, and its authors' code)
OF_GENERATOR = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
OF_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def generator_config(config):
    """The generator's configuration. Args: config: of the discriminator, which says in what the two differ."""
    shape = {name: getattr(config, name) for name in OF_GENERATOR}
    its_own = getattr(config, GENERATOR, None) or electra_shape(None, shape, GENERATOR_SIZE)[GENERATOR]
    other = copy.deepcopy(config)
    if hasattr(other, GENERATOR):
        delattr(other, GENERATOR)
    other.update(its_own)
    other.architectures = [ElectraForMaskedLM.__name__]
    return other


class ReplacedTokensMixin:
    """Gives a stock discriminator a generator, and a forward pass that trains both.

    What it is mixed into has _contexts, _embed and _run_layers of common/models/families.py.
    """

    generator_class = None  # a stock masked-language model with the same
    loss_weights = GENERATOR_WEIGHT, DISCRIMINATOR_WEIGHT

    def __init__(self, config):
        super().__init__(config)
        self._take_generator(self.generator_class(generator_config(config)))

    def _take_generator(self, generator):
        self.generator = generator
        generator.electra.embeddings = self.electra.embeddings
        generator.generator_lm_head.weight = self.electra.embeddings.word_embeddings.weight

    def forward(self, sampling_keys, token_weights, token_denominator, **masked):
        """Weighted sum of both losses of a micro-batch.

        Args:
            sampling_keys: [B, k] int64: what the draw at each masked position depends on, beside the generator.
            token_weights: [B, S] float32: 1, or 0 for padding.
            token_denominator: scalar float32: as loss_denominator, of the tokens' weights.
            masked: what MaskedPositionsMixin.forward takes.
        Returns:
            HeadLoss; outside training with `losses` and `correct` of the generator, [B, k], and those of the
            discriminator, [B, S].
        """
        ids, positions, documents = (masked[name] for name in ("input_ids", "position_ids", "document_ids"))
        places, labels, weights = (masked[f"masked_{name}"] for name in ("positions", "labels", "weights"))
        contexts = self._contexts(documents, positions, places)
        generator = self.generator
        hidden = generator._run_layers(generator._embed(ids, positions), contexts, documents, places)
        hidden = generator._transform(hidden).flatten(0, 1)
        output = head_loss(generator, hidden, labels, weights, masked["loss_denominator"])

        head = generator.get_output_embeddings()
        drawn = sample_tokens(hidden, head.weight, head.bias, sampling_keys.flatten()).view_as(labels)
        # all draws at a position are equal, its weight 0 or not; a row without targets stays as it is
        drawn = torch.where(weights.amax(dim=1, keepdim=True) > 0, drawn, labels)
        original, filled = ids.scatter(1, places, labels), ids.scatter(1, places, drawn)
        hidden = self._embed(filled, positions)  # [B, S, H]
        for layer in self.electra.encoder.layer:
            hidden = layer(hidden, contexts[0])
        logits = self.discriminator_predictions(hidden).float()
        replaced = filled != original
        losses = F.binary_cross_entropy_with_logits(logits, replaced.float(), reduction="none")
        of_tokens = (losses * token_weights).sum() / token_denominator
        loss = self.loss_weights[0] * output.loss + self.loss_weights[1] * of_tokens
        if self.training:
            return HeadLoss(loss=loss)
        judged = {"token_losses": losses, "token_correct": (logits > 0) == replaced}
        return HeadLoss(loss, output.losses, output.correct, **judged)

    def called_layers(self):
        """The layers in the order in which they are called."""
        return [*self.generator.called_layers(), *self.electra.encoder.layer]

    def get_output_embeddings(self):
        """The generator's; of the two, it has one."""
        return self.generator.get_output_embeddings()

    def save_pretrained(self, folder, state_dict=None, **options):
        """Write the discriminator to a folder, and the generator to one in it, each as stock transformers writes it.

        Args:
            folder: Path; state_dict: of both, every tied tensor under each of its names; None: the present one.
            options: of PreTrainedModel.save_pretrained.
        """
        discriminator, generator = split_weights(self.state_dict() if state_dict is None else state_dict)
        super().save_pretrained(folder, state_dict=discriminator, **options)
        self.generator.save_pretrained(Path(folder) / GENERATOR, state_dict=generator, **options)

    @classmethod
    def from_pretrained(cls, name, config, key_mapping=None, generator_name_or_path=None, **options):
        """Load a discriminator and its generator, as PreTrainedModel.from_pretrained with output_loading_info.

        Args:
            name: folder or hub name; config: of the discriminator; options: of PreTrainedModel.from_pretrained.
            generator_name_or_path: of the generator; None: it is in the discriminator's own folder.
        Raises:
            UserError: there is none, or one with other embeddings.
        """
        where = {} if generator_name_or_path else {"subfolder": GENERATOR}
        source = generator_name_or_path or name
        try:
            own = AutoConfig.from_pretrained(source, **where)
        except (OSError, ValueError) as error:  # no such folder, and one without a configuration
            if generator_name_or_path:
                raise
            raise UserError(
                f"--model_name_or_path {name} is an ELECTRA without its generator (no {GENERATOR}/config.json): name "
                "it by --generator_name_or_path; of a checkpoint step_N, scripts/convert_checkpoint.sh makes both"
            ) from error
        if own.model_type != config.model_type:
            raise UserError(f"--generator_name_or_path {source} is a {own.model_type}: give an ELECTRA's generator")
        own.update({key: getattr(config, key) for key in OF_DROPOUT})
        pair, info = ElectraForPreTraining.from_pretrained(name, config=config, **options)
        generator, more = cls.generator_class.from_pretrained(source, config=own, **where, **options)
        mine, other = (model.electra.embeddings.state_dict() for model in (pair, generator))
        if any(mine[key].shape != other[key].shape or not mine[key].equal(other[key]) for key in mine):
            raise UserError(
                f"--model_name_or_path {name} and the generator in {source} have not been trained together: their "
                "embeddings differ; give a pair"
            )
        pair.__class__ = cls
        pair._take_generator(generator)
        pair.config.update({GENERATOR: {key: getattr(own, key) for key in OF_GENERATOR}})
        info["missing_keys"] = [*info["missing_keys"], *(f"{GENERATOR}.{key}" for key in more["missing_keys"])]
        return pair, info


def split_weights(weights):
    """The weights of both, by the names that each has them under alone.

    Args:
        weights: dict by the names in ReplacedTokensMixin; what is shared may be there as the discriminator's only.
    Returns:
        (discriminator's, generator's): dicts; where there is no generator, everything is in the first.
    """
    prefix, shared = f"{GENERATOR}.", "electra.embeddings."
    discriminator = {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}
    generator = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    if generator:
        generator |= {name: tensor for name, tensor in discriminator.items() if name.startswith(shared)}
    return discriminator, generator
