"""Unigram language-model tokenizers, as ALBERT's and XLNet's: trained on the data."""

from collections.abc import Iterable

from common.data.wordpiece import MIN_VOCAB_SIZE, SPECIAL_TOKENS
from common.errors import UserError


def train_unigram(documents: Iterable[str], vocab_size: int):
    """Train an uncased Unigram tokenizer (Kudo 2018, arXiv:1804.10959).

    Args:
        documents: texts.
        vocab_size: upper limit of the number of tokens; little text yields fewer.
    Returns:
        A transformers PreTrainedTokenizerFast with [PAD], [UNK], [CLS], [SEP], [MASK] as ids 0 to 4, which frames
        texts and pairs of them as BERT's does.
    Raises:
        UserError: the vocabulary size is too small.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"--tokenizer_train_vocab_size {vocab_size}: too small; give at least {MIN_VOCAB_SIZE}")
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, unk_token="[UNK]", show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    ids = {name: tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]")}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=list(ids.items())
    )
    specials = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **specials)
