"""How a causal language model continues held-out text."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from common.data.masking import derive_key, permute
from common.data.packing import Frame
from common.report import Continuation

PROMPT_TOKENS, NEW_TOKENS = 12, 24


def continuations(folder, tokenizer, validation, number=3):
    """Let the model go on from the beginnings of some held-out documents, the most probable token each time.

    Args:
        folder: Path that holds the saved model; tokenizer: the run's.
        validation: TokenFile of the held-out documents; number: how many.
    Returns:
        list of Continuation; shorter where the text has too few documents.
    """
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    long_enough = np.flatnonzero(validation.lengths > PROMPT_TOKENS)
    order = permute(np.arange(len(long_enough)), len(long_enough), derive_key(0)) if len(long_enough) else []
    frame, found = Frame.for_causal(tokenizer), []
    for document in long_enough[order[:number]]:
        start = int(validation.starts[document])
        prompt = np.asarray(validation.tokens[start : start + PROMPT_TOKENS], dtype=np.int64).tolist()
        ids = torch.tensor([[frame.first_id, *prompt]])
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": frame.pad_id}
        with torch.no_grad():
            answer = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        continuation = tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
        found.append(Continuation(tokenizer.decode(prompt), continuation))
    return found
