"""The embedded corpus: English documentation comes out of the installed packages, code and tables do not."""

import textwrap
from itertools import islice

from common.data.embedded import MIN_CHARACTERS, clean, docstrings, embedded_documents, embedded_fingerprint

SOURCE = '''
# A comment.
"""The module's own words."""
QUERY = """select nothing"""


class Thing(Base):
    r"""A thing."""

    def method(self, argument: str = "a:") -> dict:  # noted
        """Do it."""
        return """not a docstring"""

    @decorated
    async def other(
        self,
    ):

        """Do that."""
'''

DOCSTRING = """Return the nearest of the given points, as the one that has the smallest distance to the origin.

    The points are compared with :func:`~module.distance`, which is **not** a metric; see [`Other`] and the
    documentation of ``nearest_two`` for what to do where that is needed. For example::

        points = [(1, 2), (3, 4)]

    Parameters
    ----------
    points : list
        The points that are to be compared with each other.

    >>> nearest([(1, 2), (3, 4)])
    (1, 2)

    ```python
    nearest(code)
    ```

    ====== ======
    first  second
    ====== ======
    """


def test_docstrings_are_found():
    assert list(docstrings(SOURCE)) == ["The module's own words.", "A thing.", "Do that."]
    assert list(docstrings(SOURCE.replace("  # noted", ""))) == [
        "The module's own words.",
        "A thing.",
        "Do it.",
        "Do that.",
    ]


def test_prose_is_kept_and_code_is_not():
    text = clean(DOCSTRING, set())
    assert text.startswith("Return the nearest of the given points, as the one that")
    assert (
        "compared with module.distance, which is not a metric; see Other and the documentation of nearest_two" in text
    )
    assert "points : list The points that are to be compared with each other." in text
    for code in ("(1, 2)", "-----", "Parameters", "======", "nearest(code)", "`", "*", "\n", "  "):
        assert code not in text


def test_templated_text_comes_once():
    seen = set()
    template = (
        "Build a {} tokenizer from the files that the training of the model left behind, and give it all the "
        "special tokens which that model was trained with, in the order that the model expects them to be in, "
        "so that text may be encoded and decoded again without a loss."
    )
    assert clean(template.format("`Bert`"), seen)
    assert not clean(template.format("`Electra2`"), seen)


def test_what_is_not_english_is_left_out():
    code = textwrap.dedent("""
        result = compute(first, second)
        for item in result: print(item.value, item.other_value)
        table = {key: value for key, value in result.items()}
    """)
    german = "Diese Funktion berechnet den Abstand zwischen zwei Punkten und gibt ihn als Zahl zurück. " * 4
    assert clean(code * 4, set()) == ""
    assert clean(german, set()) == ""


def test_corpus_is_the_same_each_time_and_has_no_repeated_document():
    first, second = (list(islice(embedded_documents(), 300)) for _ in range(2))
    assert first == second
    assert len(set(first)) == 300
    assert all(len(document) >= MIN_CHARACTERS and "\n" not in document for document in first)
    words = " ".join(first).lower().split()
    assert words.count("the") / len(words) > 0.04  # as English has it
    assert embedded_fingerprint() == embedded_fingerprint()
