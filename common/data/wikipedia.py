"""Wikipedia: the articles of a dump, as wikitext and as plain text, and WikiExtractor's files."""

import re
from collections.abc import Iterator
from xml.etree import ElementTree

from common.errors import UserError

LEFT_OUT_TAGS = {"table", "gallery", "timeline", "math", "syntaxhighlight", "source", "imagemap"}
LEFT_OUT_LINKS = re.compile(r"\s*(file|image|category|media|[a-z-]{2,12})\s*:", re.IGNORECASE)  # and other languages'
REFERENCES = re.compile(r"<ref\b[^>]*/>|<ref\b[^>]*>.*?</ref\s*>|</?ref\b[^>]*>", re.IGNORECASE | re.DOTALL)
BLANK = re.compile(r"\s*\n\s*\n\s*")
EXTRACTED = '<doc id="'  # how a document of WikiExtractor begins


class Wikitext(str):
    """An article as it is in the dump; plain() is its text. A str, so that it goes wherever texts go."""


def dump_articles(file, where: str) -> Iterator[Wikitext]:
    """Yield the articles of a pages-articles dump, without redirects, talk and other namespaces.

    Args:
        file: binary file of XML; where: it, for people.
    Raises:
        UserError: no XML, or cut off.
    """
    found, root = {}, None
    try:
        for event, element in ElementTree.iterparse(file, events=("start", "end")):
            tag = element.tag.rpartition("}")[2]
            if event == "start":
                root = element if root is None else root
            elif tag in ("ns", "redirect", "text"):
                found[tag] = element.text
            elif tag == "page":
                if found.get("ns") == "0" and "redirect" not in found and found.get("text"):
                    yield Wikitext(found["text"])
                found = {}
                root.clear()
    except ElementTree.ParseError as error:
        raise UserError(f"{where}: not valid XML ({error}); copy or download it again") from error


def plain(text: str) -> str:
    """The text of an article, a paragraph a line; any other text as it is."""
    if not isinstance(text, Wikitext):
        return text
    import mwparserfromhell

    code = mwparserfromhell.parse(REFERENCES.sub("", text))  # with broken markup in one the parser would give it up
    tags = code.ifilter_tags(matches=lambda tag: str(tag.tag).strip().lower() in LEFT_OUT_TAGS)
    links = code.ifilter_wikilinks(matches=lambda link: LEFT_OUT_LINKS.match(str(link.title)))
    for node in [*tags, *links]:
        try:
            code.remove(node)
        except ValueError:  # it went with what was around it
            continue
    return BLANK.sub("\n", code.strip_code(collapse=True)).strip()


def extracted_documents(lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    """Yield the documents of a file that WikiExtractor wrote. Args: lines: (number, line) pairs."""
    document = []
    for _, line in lines:
        if line.startswith(EXTRACTED):
            document = []
        elif line == "</doc>":
            yield "\n".join(document)
        else:
            document.append(line)
