"""Which texts the published rules leave out, each rule at its threshold, and what is said of them."""

import json

import pytest

from common.prepare.cleaning import BULLETS, _duplicate_ngram_characters, c4, gopher, make_cleaner

SENTENCE = "the quick brown foxes have jumped over a dog that sleeps"  # 11 words, 3 of the commonest


def varied(words, seed=0):
    """A text of that many different words, with the commonest among them."""
    return "the and of " + " ".join(
        f"word{chr(97 + (n + seed) % 26)}{chr(97 + n // 26 % 26)}{chr(97 + n // 676)}" for n in range(words - 3)
    )


def reason(judge, text):
    return judge(text)[1]


GOOD = varied(100)


def test_a_text_that_passes_is_left_as_it_is():
    assert gopher(GOOD) == (GOOD, None)
    assert make_cleaner(None, False)("x") == ("x", None) and make_cleaner("gopher", False)(GOOD) == (GOOD, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (varied(49), "not 50 to 100,000 words"),
        (varied(50), None),
        ("the and of " + "ab " * 100, "mean word not of 3 to 10 characters"),
        (" ".join(word * 2 for word in varied(100).split()), "mean word not of 3 to 10 characters"),
        (GOOD.replace("word", "#word", 11), "many # or ellipses"),
        (GOOD + " ..." * 12, "many # or ellipses"),
        (
            "\n".join(
                f"{BULLETS[n % 3]} {line}" for n, line in enumerate(GOOD.replace(" wordf", "\nwordf").split("\n"))
            ),
            "lines are bullet points",
        ),
        (
            "".join(
                f"{word}{' ...' if n % 31 == 5 else ''}{chr(10) if n % 31 == 5 else ' '}"
                for n, word in enumerate(varied(124).split())
            ),
            "lines end in ellipses",
        ),
        (varied(75) + " 12345" * 26, "words without letters"),
        (GOOD.replace("the and", "wordzz wordyy"), "too few of the commonest words"),
        ("\n".join([varied(40), *["a line that comes again"] * 3]), "repeated lines"),
        ("\n\n".join([varied(40, 1), varied(40, 1)]), "repeated lines"),
        (varied(60) + " buy it now" * 20, "one phrase of 3 words over and over"),
    ],
)
def test_gophers_rules(text, expected):
    assert reason(gopher, text) == expected


def test_repeated_phrases():
    phrase = " ".join(varied(20, 5).split()[3:])  # 17 words
    text = " ".join([varied(60), phrase, varied(40, 13), phrase])
    assert reason(gopher, text) is None or reason(gopher, text).startswith("repeated phrases")
    words = [*"abcdefgh", *"xyz", *"abcdefgh"]
    assert _duplicate_ngram_characters(words, 5) == 8 and _duplicate_ngram_characters(words, 9) == 0
    assert _duplicate_ngram_characters(["ab"] * 12, 5) == 2 * 11


def test_c4s_rules():
    fine = "This is a sentence of some words.\nAnd here is the second of them!\nIs this not the third one?"
    assert c4(fine) == (fine, None)
    noisy = f"Menu\n{fine}\nPlease turn on Javascript to read this page.\nshort one.\na line without an end"
    assert c4(noisy) == (fine, None)
    assert reason(c4, fine + "\nLorem ipsum dolor sit amet consectetur.") == "lorem ipsum"
    assert "curly" in reason(c4, fine + "\nint main() { return 0; } // as code.")
    assert "fewer than 3 sentences" in reason(c4, fine.rpartition("\n")[0])


def test_unicode_is_repaired():
    assert make_cleaner(None, True)("schÃ¶n, itâ€™s") == ("schön, it's", None)


def test_what_is_left_out_is_counted_with_samples(harness, tmp_path):
    documents = [*(varied(80, seed) for seed in range(10)), *["too short"] * 7]
    with open(tmp_path / "a.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    flags = ["--input", tmp_path / "a.jsonl", "--filter", "gopher", "--output_dir", tmp_path / "out", "--workers", 1]
    flags += ["--validation_split_percentage", 0, "--test_split_percentage", 0]
    said = harness.run("prepare_pile_data.py", *flags).check().stdout
    assert "shard 0: left out 7: not 50 to 100,000 words" in said and "10 for train" in said
    described = json.loads((tmp_path / "out" / "shards" / "00000.json").read_text())
    assert described["dropped"] == {"not 50 to 100,000 words": [7, ["too short"] * 3]}
