"""A look inside token files: counts, lengths, unknown tokens, and some documents as text."""

from pathlib import Path

import numpy as np

from common.data.token_files import BLOCK_TOKENS, TokenFile
from common.data.tokenizers import load_tokenizer
from common.errors import UserError
from common.prepare.inputs import ANY
from common.prepare.merge import SPLITS

BARS = 40  # of the histogram
SHOWN_TOKENS = 60  # of a document


def inspect(path, args, say):
    """Print what token files hold and draw their documents' lengths beside them, in lengths.png.

    Args:
        path: a prepared folder, or a token file without its ending; args: InspectArguments; say: function that prints.
    Raises:
        UserError: no token files there.
    """
    path = Path(path).expanduser()
    if path.suffix in (".bin", ".idx", ".json"):
        path = path.with_suffix("")
    prefixes = [path]
    if path.is_dir():
        prefixes = [path / name for name in SPLITS if (path / f"{name}.bin").exists()] or [path / SPLITS[0]]
    files = {prefix.name: TokenFile(prefix) for prefix in prefixes}
    kept = (path if path.is_dir() else path.parent) / "tokenizer"
    named = args.tokenizer_name or (str(kept) if kept.is_dir() else None)
    tokenizer = load_tokenizer(named, kind=ANY) if named else None
    for name, file in files.items():
        for line in describe(name, file, tokenizer):
            say(line)
    if tokenizer is None:
        say("no tokenizer beside the files: --tokenizer_name shows documents as text")
    else:
        for line in samples(next(iter(files.values())), tokenizer, args.num_samples, args.seed):
            say(line)
    picture = path / "lengths.png" if path.is_dir() else path.with_name(f"{path.name}-lengths.png")
    draw_lengths(files, picture)
    say(f"lengths of the documents: {picture}")
    return 0


def describe(name, file, tokenizer):
    """Lines on what a token file holds.

    Args:
        name: str; file: TokenFile; tokenizer: transformers' fast one, or None.
    """
    lengths = file.document_lengths()
    size = sum(path.stat().st_size for path in file.paths.values() if path.exists())
    total = int(lengths.sum())
    sentences = f"{len(file.lengths):,} sentences, " if len(file.lengths) > file.num_documents else ""
    kind = file.tokens.dtype.name
    yield f"{name}: {file.num_documents:,} documents, {sentences}{total:,} tokens of {kind}, {size / 1e6:,.1f} MB"
    quantiles = np.quantile(lengths, (0, 0.25, 0.5, 0.75, 1)).astype(int)
    yield f"  tokens in a document: least {quantiles[0]:,}, quarter {quantiles[1]:,}, half {quantiles[2]:,}, "
    yield f"    three quarters {quantiles[3]:,}, most {quantiles[4]:,}; mean {lengths.mean():,.1f}"
    facts = file.metadata or {}
    sources = facts.get("sources", {})
    for label, (documents, tokens, *_) in sorted(sources.items(), key=lambda part: -part[1][1]):
        if label:
            yield f"  {tokens / total:6.1%} of the tokens: {label} ({documents:,} documents)"
    totals = [
        facts.get(name, sum(counts[at] for counts in sources.values()))
        for at, name in ((2, "characters"), (3, "words"))
    ]
    if all(totals):
        yield f"  {total / totals[1]:.2f} tokens for a word, {totals[0] / total:.2f} characters in a token"
    if tokenizer is not None and tokenizer.unk_token_id is not None:
        unknown = sum(
            int((file.tokens[at : at + BLOCK_TOKENS] == tokenizer.unk_token_id).sum())
            for at in range(0, len(file.tokens), BLOCK_TOKENS)
        )
        yield f"  unknown tokens: {unknown:,} ({unknown / total:.3%})"


def samples(file, tokenizer, number, seed):
    """Lines with the beginnings of documents chosen by chance. Args: as describe's; number, seed: int."""
    chosen = np.random.default_rng(seed).choice(file.num_documents, min(number, file.num_documents), replace=False)
    for document in sorted(chosen):
        first, last = file.documents[document : document + 2]
        starts, lengths = file.starts[first:last], file.lengths[first:last]
        ids = np.concatenate([file.tokens[at : at + size] for at, size in zip(starts, lengths, strict=True)])
        text = tokenizer.decode(ids[:SHOWN_TOKENS]) if len(ids) else ""
        more = f" ... ({len(ids) - SHOWN_TOKENS:,} tokens more)" if len(ids) > SHOWN_TOKENS else ""
        yield f"  document {document:,}: {' '.join(text.split())}{more}"


def draw_lengths(files, picture):
    """A histogram of the documents' lengths. Args: files: {name: TokenFile}; picture: Path of a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    lengths = {name: file.document_lengths() for name, file in files.items()}
    most = max(int(found.max()) for found in lengths.values())
    bins = np.geomspace(1, most + 1, BARS)
    for name, found in lengths.items():
        axes.hist(found, bins, histtype="step", label=f"{name} ({len(found):,})")
    axes.set(xscale="log", xlabel="tokens in a document", ylabel="documents", title="Lengths of the documents")
    axes.legend()
    try:
        figure.savefig(picture)
    except OSError as error:
        raise UserError(f"{picture}: cannot be written ({error.strerror})") from error
