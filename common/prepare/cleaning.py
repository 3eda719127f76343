"""What is done to a text before it is tokenized, and which texts are left out, with the published thresholds.

Sources: Rae et al. 2021 (Gopher, arXiv:2112.11446), appendix A.1.1 and table A1; Raffel et al. 2020 (C4,
arXiv:1910.10683v4), section 2.2, without its list of bad words.
"""

import re
from collections import Counter
from collections.abc import Callable

WORD = re.compile(r"\S+")
PARAGRAPHS = re.compile(r"\n{2,}")

# ---- Gopher: quality ----------------------------------------------------------------------------------------
WORDS = 50, 100_000  # in a document
WORD_LENGTH = 3, 10  # mean, in characters
SYMBOLS_PER_WORD = 0.1  # of "#" and of ellipses
BULLET_LINES, ELLIPSIS_LINES = 0.9, 0.3  # most
ALPHABETIC_WORDS = 0.8  # least
STOP_WORDS, LEAST_STOP_WORDS = frozenset("the be to of and that have with".split()), 2
BULLETS, ELLIPSES = ("•", "‣", "▪", "◦", "-", "*"), ("...", "…")
# ---- Gopher: repetition, most ---------------------------------------------------------------------------------
DUPLICATE_LINES = DUPLICATE_PARAGRAPHS = 0.3
DUPLICATE_LINE_CHARACTERS = DUPLICATE_PARAGRAPH_CHARACTERS = 0.2
TOP_NGRAM_CHARACTERS = {2: 0.2, 3: 0.18, 4: 0.16}  # of the most frequent one
DUPLICATE_NGRAM_CHARACTERS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}
# ---- C4 -------------------------------------------------------------------------------------------------------
TERMINAL = (".", "!", "?", '"', "”")
LINE_WORDS, LEAST_SENTENCES = 5, 3
SENTENCE_END = re.compile(r"[.!?]+[\"”')\]]*(?:\s|$)")


def make_cleaner(preset: str | None, fix_unicode: bool) -> Callable[[str], tuple[str, str | None]]:
    """The function from a text to (the text to take, None), or to (the text, why it is left out).

    Args:
        preset: "gopher", "c4" or None for no filter; fix_unicode: whether ftfy repairs wrong encodings first.
    """
    judge = FILTERS[preset] if preset else lambda text: (text, None)
    if not fix_unicode:
        return judge
    from ftfy import fix_text

    return lambda text: judge(fix_text(text).strip())


def gopher(text):
    """The text, and why Gopher's rules leave it out, None where they do not."""
    return text, _poor(text) or _repetitive(text)


def c4(text):
    """The lines that C4's rules keep of a text, and why they leave it out, None where they do not."""
    lowered = text.lower()
    for word, reason in (("lorem ipsum", "lorem ipsum"), ("{", "a curly bracket, as in code")):
        if word in lowered:
            return text, reason
    lines = [line.strip() for line in text.split("\n")]
    kept = [
        line
        for line in lines
        if line.endswith(TERMINAL) and len(line.split()) >= LINE_WORDS and "javascript" not in line.lower()
    ]
    found = "\n".join(kept)
    if len(SENTENCE_END.findall(found)) < LEAST_SENTENCES:
        return text, f"fewer than {LEAST_SENTENCES} sentences in lines that end as sentences do"
    return found, None


FILTERS = {"gopher": gopher, "c4": c4}


def _poor(text):
    words = WORD.findall(text)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    least, most = WORDS
    if not least <= len(words) <= most:
        return f"not {least} to {most:,} words"
    low, high = WORD_LENGTH
    if not low <= sum(map(len, words)) / len(words) <= high:
        return f"mean word not of {low} to {high} characters"
    if max(text.count("#"), sum(map(text.count, ELLIPSES))) / len(words) > SYMBOLS_PER_WORD:
        return "many # or ellipses"
    if sum(line.startswith(BULLETS) for line in lines) / len(lines) > BULLET_LINES:
        return "lines are bullet points"
    if sum(line.endswith(ELLIPSES) for line in lines) / len(lines) > ELLIPSIS_LINES:
        return "lines end in ellipses"
    if sum(any(map(str.isalpha, word)) for word in words) / len(words) < ALPHABETIC_WORDS:
        return "words without letters"
    if len(STOP_WORDS.intersection(word.lower() for word in words)) < LEAST_STOP_WORDS:
        return "too few of the commonest words"
    return None


def _repetitive(text):
    for parts, share, characters, what in (
        (text.split("\n"), DUPLICATE_LINES, DUPLICATE_LINE_CHARACTERS, "lines"),
        (PARAGRAPHS.split(text), DUPLICATE_PARAGRAPHS, DUPLICATE_PARAGRAPH_CHARACTERS, "paragraphs"),
    ):
        parts = [part.strip() for part in parts if part.strip()]
        again = [part for part, count in Counter(parts).items() for _ in range(count - 1)]
        if len(again) / len(parts) > share or sum(map(len, again)) / len(text) > characters:
            return f"repeated {what}"
    words = WORD.findall(text)
    for size, most in TOP_NGRAM_CHARACTERS.items():
        ngrams = Counter(zip(*(words[at:] for at in range(size)), strict=False))
        if ngrams:
            ngram, count = ngrams.most_common(1)[0]
            if count > 1 and count * sum(map(len, ngram)) / len(text) > most:
                return f"one phrase of {size} words over and over"
    for size, most in DUPLICATE_NGRAM_CHARACTERS.items():
        if _duplicate_ngram_characters(words, size) / len(text) > most:
            return f"repeated phrases of {size} words"
    return None


def _duplicate_ngram_characters(words, size):
    """Characters of the words in n-grams that stood before, each word counted once."""
    seen, covered, characters = set(), 0, 0  # words before `covered` are counted
    for at in range(len(words) - size + 1):
        ngram = tuple(words[at : at + size])
        if ngram in seen:
            characters += sum(map(len, words[max(at, covered) : at + size]))
            covered = at + size
        seen.add(ngram)
    return characters
