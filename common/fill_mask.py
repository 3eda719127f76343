"""What a masked-language model answers on held-out text."""

import numpy as np
import torch
from transformers import AutoModelForMaskedLM

from common.data.masking import derive_key, permute
from common.report import FillMaskExample

EXAMPLE_TOKENS = 24  # length of a sentence that is shown
LEAST_WORD = 4  # characters; shorter words are mostly easy


def fill_mask_examples(folder, tokenizer, validation, number=3, answers=3):
    """Mask one word in some held-out sentences and let the model fill it in.

    Args:
        folder: Path that holds the saved model.
        tokenizer: the run's.
        validation: TokenFile of the held-out documents.
        number: sentences; answers: tokens shown for each.
    Returns:
        list of FillMaskExample; shorter where the text has too few suitable sentences.
    """
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    longest = min(EXAMPLE_TOKENS, model.config.max_position_embeddings - 2)
    examples = []
    number_of_documents = len(validation.lengths)
    documents = permute(np.arange(number_of_documents), number_of_documents, derive_key(0))
    for document in documents[:1000]:
        start, length = int(validation.starts[document]), int(validation.lengths[document])
        ids = np.asarray(validation.tokens[start : start + min(length, longest)], dtype=np.int64)
        places = [place for place in range(4, len(ids) - 4) if _is_whole_word(tokenizer, ids, place)]
        if len(ids) < EXAMPLE_TOKENS // 2 or not places:
            continue
        place = places[len(places) // 2]
        target, ids[place] = int(ids[place]), tokenizer.mask_token_id
        row = torch.tensor([[tokenizer.cls_token_id, *ids.tolist(), tokenizer.sep_token_id]])
        with torch.no_grad():
            probability = model(input_ids=row).logits[0, place + 1].float().softmax(-1)
        top = probability.topk(answers)
        words = [tokenizer.decode([token]) for token in top.indices.tolist()]
        pairs = list(zip(words, top.values.tolist(), strict=True))
        examples.append(FillMaskExample(tokenizer.decode(ids.tolist()), tokenizer.decode([target]), pairs))
        if len(examples) == number:
            break
    return examples


def _is_whole_word(tokenizer, ids, place):
    word, following = tokenizer.convert_ids_to_tokens([int(ids[place]), int(ids[place + 1])])
    return word.isalpha() and len(word) >= LEAST_WORD and not following.startswith("##")
