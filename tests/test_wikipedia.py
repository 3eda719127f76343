"""Wikipedia: articles of a dump as plain text, and WikiExtractor's files."""

import bz2

import pytest

from common.data.blocks import BadRecords
from common.data.documents import read_documents, read_labelled
from common.data.wikipedia import Wikitext, plain
from common.errors import UserError

DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">
  <siteinfo><sitename>Wikipedia</sitename></siteinfo>
  {pages}
</mediawiki>
"""
PAGE = "<page><title>{0}</title><ns>{1}</ns>{2}<revision><text>{3}</text></revision></page>"
ARTICLE = """{{Infobox|name=x|map=[[File:a.png|thumb|left out]]}}
'''Bold''' and ''slanted'' [[target|words]], a [[link]]&lt;ref name="a"&gt;A [[source]].&lt;/ref&gt;.
[[File:b.jpg|thumb|A [[caption]].]]

== History ==
{| class="wikitable"
| a cell
|}
It had a [https://example.org history].

[[Category:Things]]
[[de:Ding]]
"""
TEXT = "Bold and slanted words, a link.\nHistory\nIt had a history."


def read(*paths, max_bad_records=0):
    return list(read_documents(paths, "text", "line", BadRecords(max_bad_records)))


def dump(path, *pages, end=None):
    path.write_bytes(bz2.compress(DUMP.format(pages="\n  ".join(pages)).encode()[:end]))
    return path


def test_articles_alone_and_their_text_alone(tmp_path):
    pages = [PAGE.format("One", 0, "", ARTICLE), PAGE.format("Talk:One", 1, "", "talk")]
    pages += [PAGE.format("Uno", 0, '<redirect title="One" />', "#REDIRECT [[One]]"), PAGE.format("Two", 0, "", "two")]
    assert read(dump(tmp_path / "pages-articles1.xml-p1p9.bz2", *pages)) == [TEXT, "two"]
    (raw, label), _ = read_labelled([tmp_path / "pages-articles1.xml-p1p9.bz2"], "text", "line", BadRecords())
    assert isinstance(raw, Wikitext) and label == "" and plain(raw) == TEXT and plain("[[x]]") == "[[x]]"


def test_a_dump_that_is_cut_off(tmp_path):
    path = dump(tmp_path / "a.xml.bz2", PAGE.format("One", 0, "", "one"), end=-20)
    with pytest.raises(UserError, match="a.xml.bz2: not valid XML"):
        read(path)


def test_a_real_dump(data_folder):
    (path,) = (data_folder / "wikipedia").glob("*pages-articles*.bz2")
    articles = read(path)
    assert 50 < len(articles) < 206 and sum(map(len, articles)) > 10**6
    for markup in ("{{", "[[", "<ref", "{|", "'''", "[[Category:"):
        share = sum(markup in article for article in articles) / len(articles)
        assert share < 0.1, (markup, share)


def test_what_wikiextractor_wrote(data_folder):
    (path,) = (data_folder / "wikipedia" / "wikiextractor").rglob("wiki_*")
    articles, whole = read(path), path.read_text()
    assert len(articles) == whole.count("<doc id=") and articles[0].startswith("Anarchism\n")
    assert not any("<doc" in article or "</doc>" in article for article in articles)
