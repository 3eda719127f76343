"""A corpus that is on every machine: the English documentation inside the installed Python packages.

Docstrings and the standard library's help topics, cleaned of code, tables and templated text. It follows the
installed packages: the same requirements give the same corpus.
"""

import hashlib
import os
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

VERSION = 1  # of the cleaning below; a new one makes caches prepare the corpus again
MIN_CHARACTERS = 200  # of a document
SHORT_BLOCK = 40  # characters; a block below this is kept if it is a sentence, and may be repeated
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "lib2to3", "__pycache__"}
COMMON_WORDS = frozenset(
    "the of to a and in is that for it as be are this with or by not if on which an can from will when at used you has"
    " have was were but all any should must may use only its one no more than each".split()
)

CODE_LINE = re.compile(r"\s*(>>>|\.\.\.($| )|In \[\d+\]|Out\[\d+\]|\$ |% |@\w|\.\. \w|#!|<[/\w]|[|+]|[=-]+ +[=-]+)")
UNDERLINE = re.compile(r"\s*([=~^_`*#.\"'-])\1{2,}\s*$")  # of a heading
FENCE = re.compile(r"```.*?(```|\Z)", re.S)
ITEM = re.compile(r"\s*([-*+]|\d+[.)]|:\w+[^:]*:|@\w+)\s")
ROLE = re.compile(r":[\w:+-]+:`~?!?([^`<]*?)\s*(?:<[^`]*>)?`")  # :class:`~module.Name`, :ref:`text <target>`
MARKUP = re.compile(r"\[?`+~?([^`]*)`+_{0,2}\]?|\*\*([^*]+)\*\*|\*(\w[^*]*)\*")
LINK = re.compile(r"\[([^][]*)\]\([^()\s]*\)|<?https?://[^\s>)]*>?")
WORD = re.compile(r"[a-z]+")


def embedded_fingerprint() -> str:
    """Return a hash of what decides the corpus: installed packages, Python's version, this module's version."""
    installed = [name.lower() for _, folder in _roots() for name in os.listdir(folder) if name.endswith("-info")]
    facts = "\n".join([f"format {VERSION}", sys.version.split()[0], *sorted(installed)])
    return hashlib.sha256(facts.encode()).hexdigest()


def embedded_documents() -> Iterator[str]:
    """Yield the documents, each a docstring or a help topic of at least 200 characters, its white space collapsed.

    The order is that of the paths inside the library folders, so it does not depend on where they lie. Of blocks
    (paragraphs, list items) that differ in names and numbers alone, the first is kept.
    """
    return (document for _, document in documents_of_packages())


def documents_of_packages() -> Iterator[tuple[str, str]]:
    """Yield (package, document), as embedded_documents; the standard library is one package, "stdlib"."""
    seen = set()
    for package, text in _raw_documents():
        document = clean(text, seen)
        if document:
            yield package, document


def _roots() -> list[tuple[str, str]]:
    """Name and folder of the standard library and of the installed packages."""
    folders = {sysconfig.get_path(name): name for name in ("platlib", "purelib", "stdlib")}
    return sorted((name, folder) for folder, name in folders.items() if os.path.isdir(folder))


def _raw_documents() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    yield from (("stdlib", text) for _, text in sorted(topics.items()))
    for name, folder in _roots():
        for path in _python_files(folder):
            package = name if name == "stdlib" else path.relative_to(folder).parts[0].removesuffix(".py")
            yield from ((package, text) for text in docstrings(path.read_text(encoding="utf-8", errors="ignore")))


def _python_files(root: str) -> Iterator[Path]:
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(names) if name.endswith(".py"))


def docstrings(source: str) -> Iterator[str]:
    """Find docstrings in Python source by their quotes, thirty times faster than by parsing it.

    Args:
        source: the text of a .py file.
    Yields:
        Every string in triple double quotes that follows a colon at a line's end, or only comments.
    """
    parts = source.split('"""')
    for before, text in zip(parts[0::2], parts[1::2], strict=False):
        header = before[-200:].rstrip("rRuU").rstrip().rpartition("\n")[2]
        if header.endswith(":") or header.startswith("#") or not before.strip("rRuU \n"):
            yield text


def clean(text: str, seen: set[int]) -> str:
    """Reduce a docstring to its English prose.

    Args:
        text: a docstring as it stands in the source.
        seen: hashes of the blocks met so far; this text's are added.
    Returns:
        The document on one line, empty where too little is left.
    """
    if len(text) < MIN_CHARACTERS:
        return ""
    first, _, rest = text.expandtabs().partition("\n")
    text = first.strip() + "\n" + textwrap.dedent(rest)
    lines = (FENCE.sub("", text) if "```" in text else text).split("\n")
    blocks = [block for block in map(_plain, _blocks(lines)) if _is_new(block, seen)]
    document = " ".join(blocks)
    return document if len(document) >= MIN_CHARACTERS and _is_english(document) else ""


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Split into paragraphs and list items, leaving out code, tables and the output that follows code."""
    block, in_code, literal_indent = [], False, None
    for line in lines:
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if literal_indent is not None and stripped:
            if indent > literal_indent:
                continue  # inside what a line ending in :: announced
            literal_indent = None
        if UNDERLINE.match(line):
            block = []  # and its heading
        elif not stripped or CODE_LINE.match(line):
            yield block
            block, in_code = [], bool(stripped)
        elif not in_code:
            if block and (ITEM.match(line) or indent < len(block[-1]) - len(block[-1].lstrip())):
                yield block
                block = []
            block.append(line)
            if stripped.endswith("::"):
                literal_indent = indent
    yield block


def _plain(block: list[str]) -> str:
    """Join a block's lines and take the markup off."""
    text = " ".join(line.strip() for line in block)
    if text.endswith("::"):
        text = text[:-1]
    if "`" in text or "*" in text:
        text = ROLE.sub(r"\1", text)
        text = MARKUP.sub(lambda match: match[1] or match[2] or match[3] or "", text)
    if "](" in text or "://" in text:
        text = LINK.sub(r"\1", text)
    return " ".join(text.split())


def _is_new(block: str, seen: set[int]) -> bool:
    if len(block) < SHORT_BLOCK:
        return block.endswith(".")
    key = hash(tuple(word for word in block.split() if word.isalpha() and word.islower()))
    if key in seen:
        return False
    seen.add(key)
    return True


def _is_english(document: str) -> bool:
    """Judge by the share of common words among all and by the share of letters among the characters."""
    words = WORD.findall(document.lower())
    common = sum(map(COMMON_WORDS.__contains__, words))
    letters = sum(map(len, words))
    return common >= 0.2 * len(words) and letters >= 0.68 * len(document)
