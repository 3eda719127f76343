"""What a finished masked-language model leaves and shows: curves, model card, answers on held-out text, a summary."""

import time

import numpy as np
import torch
from transformers import AutoModelForMaskedLM

from common import run_folder
from common.data.masking import derive_key, permute
from common.report import (
    FillMaskExample,
    format_summary,
    read_metrics,
    write_all_results,
    write_curves,
    write_model_card,
)
from common.utilisation import FORMULA

EXAMPLE_TOKENS = 24  # length of a sentence that is shown
LEAST_WORD = 4  # characters; shorter words are mostly easy


def fill_mask_examples(model, tokenizer, validation, number=3, answers=3):
    """Mask one word in some held-out sentences and let the model fill it in.

    Args:
        model: a stock masked-language model, as from_pretrained loads it.
        tokenizer: the run's.
        validation: TokenFile of the held-out documents.
        number: sentences; answers: tokens shown for each.
    Returns:
        list of FillMaskExample; shorter where the text has too few suitable sentences.
    """
    model.eval()
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


def report(output_dir, results, corpus, config, command, peak):
    """Leave curves, model card and results in the folder of a finished run, and show the summary.

    Args:
        output_dir: Path that holds the saved model, which is loaded from there.
        results: as for all_results.json; corpus: PreparedCorpus; config: the model's.
        command: the command line of the run; peak: FLOP/s that utilisation was measured against.
    """
    model = AutoModelForMaskedLM.from_pretrained(output_dir)
    examples = fill_mask_examples(model, corpus.tokenizer, corpus.validation)
    title = f"{config.model_type} pretrained on {corpus.source}"
    metrics = read_metrics(output_dir / run_folder.METRICS)
    write_curves(metrics, output_dir / "curves.png", title, results["unigram_loss"])
    shape = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    budget = {
        "hours used": f"{results['train_runtime'] / 3600:.3f}",
        "steps": f"{results['train_steps']:,}",
        "ended by": results["stop_reason"],
        "hardware": f"{results['world_size']} x {results['device']}, {results['precision']}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": run_folder.git_commit() or "unknown",
    }
    write_model_card(
        output_dir / "README.md",
        title=title,
        command=command,
        facts={
            "Data": {"text": corpus.source, "tokens seen": f"{results['train_tokens']:,}"},
            "Budget": budget,
            "Model": {name: str(getattr(config, name)) for name in shape},
        },
        results=results,
        examples=examples,
        licence_note="The weights are yours. The text has its own licences: see its source before you publish them.",
        tags=(config.model_type,),
    )
    formula = f"FLOPs needed per second / {peak / 1e9:,.0f} GFLOP/s (best matrix product here); FLOPs = {FORMULA}"
    names = {"model": ".", "model card": "README.md", "curves": "curves.png", "metrics": run_folder.METRICS}
    files = {name: output_dir / file for name, file in names.items()} | {"prepared data": corpus.folder}
    print(format_summary(results, examples=examples, files=files, model_folder=output_dir, mfu_formula=formula))
    write_all_results(output_dir / run_folder.RESULTS, results)  # last: says that the run is finished
