"""Token files: the bytes are Megatron's, what is damaged is refused."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from common.data.token_files import TokenFile, TokenFileWriter, token_dtype
from common.errors import UserError

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 60000, 11]]


def write(prefix, documents=DOCUMENTS, dtype=np.uint16):
    with TokenFileWriter(prefix, dtype) as writer:
        writer.append(np.array(sum(documents[:2], []), dtype), [len(document) for document in documents[:2]])
        writer.append(np.array(sum(documents[2:], []), dtype), [len(document) for document in documents[2:]])
        writer.finish({"tokenizer_name": "none", "tokenizer_fingerprint": "0"})
    return prefix


def documents_of(token_file):
    sequences = [
        token_file.tokens[start : start + length].tolist()
        for start, length in zip(token_file.starts, token_file.lengths, strict=True)
    ]
    bounds = token_file.documents
    return [sum(sequences[bounds[i] : bounds[i + 1]], []) for i in range(token_file.num_documents)]


def plain_megatron_writer(prefix, documents, code, letter):
    """The format written number by number, from its description alone."""
    size = struct.calcsize(f"<{letter}")
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(documents), len(documents) + 1)
    index += b"".join(struct.pack("<i", len(document)) for document in documents)
    position = 0
    for document in documents:
        index += struct.pack("<q", position)
        position += len(document) * size
    index += b"".join(struct.pack("<q", number) for number in range(len(documents) + 1))
    Path(f"{prefix}.idx").write_bytes(index)
    tokens = b"".join(struct.pack(f"<{letter}", token) for document in documents for token in document)
    Path(f"{prefix}.bin").write_bytes(tokens)


@pytest.mark.parametrize(("dtype", "code", "letter"), [(np.uint16, 8, "H"), (np.int32, 4, "i")])
def test_bytes_equal_those_of_a_plain_writer(tmp_path, dtype, code, letter):
    write(tmp_path / "ours", dtype=dtype)
    plain_megatron_writer(tmp_path / "plain", DOCUMENTS, code, letter)
    for kind in ("bin", "idx"):
        assert (tmp_path / f"ours.{kind}").read_bytes() == (tmp_path / f"plain.{kind}").read_bytes()
    ours, plain = TokenFile(tmp_path / "ours"), TokenFile(tmp_path / "plain")
    assert documents_of(ours) == documents_of(plain) == DOCUMENTS
    assert plain.metadata is None
    assert ours.metadata["num_tokens"] == 8 and ours.metadata["num_documents"] == 3
    ours.verify()
    plain.verify()


def test_types():
    assert (token_dtype(65536), token_dtype(65537)) == (np.uint16, np.int32)


def test_genuine_megatron_files(data_folder):
    prefix = data_folder / "megatron" / "meg-gpt2-openwebtext_text_document"
    token_file = TokenFile(prefix)
    assert token_file.num_documents == 1000 and token_file.tokens.dtype == np.uint16
    assert token_file.lengths.sum() == len(token_file.tokens)
    vocabulary = json.loads((prefix.parent / "gpt2-tiny-vocab.json").read_text())
    assert int(token_file.tokens.max()) < len(vocabulary)
    words = {index: token for token, index in vocabulary.items()}
    text = "".join(words[token] for token in documents_of(token_file)[0]).replace("Ġ", " ")
    assert text.count(" the ") > 3  # English comes out


def test_subset_shares_tokens_and_keeps_sequences_together(tmp_path):
    token_file = TokenFile(write(tmp_path / "a"))
    assert documents_of(token_file.subset(np.array([2, 0]))) == [DOCUMENTS[0], DOCUMENTS[2]]
    token_file.documents = np.array([0, 2, 3])  # two sentences, then one
    assert documents_of(token_file.subset(np.array([0]))) == [DOCUMENTS[0] + DOCUMENTS[1]]
    assert documents_of(token_file.subset(np.array([1]))) == [DOCUMENTS[2]]


def plain_counts(documents, size):
    return [sum(document.count(token) for document in documents) for token in range(size)]


@pytest.mark.parametrize("block", [1, 2, 5, 1 << 20])
def test_tokens_are_counted_in_the_documents_of_a_view_alone(tmp_path, monkeypatch, block):
    monkeypatch.setattr("common.data.token_files.BLOCK_TOKENS", block)
    documents = [[1, 2, 2], [3], [4, 4, 1, 5], [], [2, 5]]
    token_file = TokenFile(write(tmp_path / "a", documents))
    for chosen in ([0, 1, 2, 3, 4], [0, 1], [0, 2], [1, 3, 4], [2], [3], []):
        view = token_file.subset(np.array(chosen, np.int64))
        counts = view.token_counts(7)
        assert counts.dtype == np.int64
        assert counts.tolist() == plain_counts([documents[number] for number in chosen], 7)
    view = token_file.subset(np.array([0, 2, 4]))
    for most in range(10):
        first = [1, 2, 2, 4, 4, 1, 5, 2, 5][:most]
        assert view.token_counts(7, most).tolist() == plain_counts([first], 7)


def test_nothing_is_left_of_an_unfinished_file(tmp_path):
    with pytest.raises(KeyError), TokenFileWriter(tmp_path / "a", np.uint16) as writer:
        writer.append(np.array([1, 2], np.uint16), [2])
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def change(**changes):
    """Edit of a .json; None removes a key."""

    def edit(content):
        metadata = {**json.loads(content), **changes}
        return json.dumps({key: value for key, value in metadata.items() if value is not None}).encode()

    return edit


def put(at, form, value):
    """Edit of an .idx: a number at a place."""

    def edit(content):
        content = bytearray(content)
        struct.pack_into(form, content, at, value)
        return bytes(content)

    return edit


def flip(at):
    def edit(content):
        content = bytearray(content)
        content[at] ^= 1
        return content

    return edit


@pytest.mark.parametrize(
    ("kind", "edit", "said"),
    [
        ("bin", flip(3), "checksum"),
        ("bin", lambda content: content[:-1], "shorter than its index says"),
        ("bin", lambda content: b"", "holds no tokens"),
        ("bin", lambda content: content + b"xx", "checksum"),
        ("idx", flip(0), "not a Megatron index"),
        ("idx", lambda content: content[:-1], "cut off"),
        ("idx", lambda content: content[:20], "not a Megatron index"),
        ("idx", flip(9), "version 0"),
        ("idx", flip(17), "type code 9"),
        ("idx", flip(-1), "damaged"),
        ("idx", flip(34), "num_tokens is 7, but 8"),
        ("idx", put(46, "<q", 2), "checksum"),
        ("idx", put(18, "<Q", 2), "its size does not fit its 2 sequences"),
        ("idx", put(26, "<Q", 3), "its size does not fit"),
        ("idx", lambda content: put(26, "<Q", 3)(content)[:-8], "damaged"),
        ("idx", lambda content: put(26, "<Q", 0)(content)[:-32], "damaged"),
        ("idx", lambda content: put(26, "<Q", 5)(content) + content[-8:], "num_documents is 4, but 3"),
        ("idx", put(34, "<i", -1), "damaged"),
        ("idx", put(17, "<B", 3), "dtype is int16, but uint16"),
        ("json", lambda content: content[:40], "does not describe"),
        ("json", lambda content: b"[]", "does not describe"),
        ("json", lambda content: b"\xff", "does not describe"),
        ("json", change(format=None), "does not describe"),
        ("json", change(checksums=None), "checksums"),
        ("json", change(checksums={"bin": 1}), "checksums"),
        ("json", change(checksums=[1, 2]), "checksums"),
        ("json", change(tokenizer_fingerprint=None), "tokenizer_fingerprint"),
        ("json", change(tokenizer_name=5), "tokenizer_name"),
        ("json", change(num_documents="3"), "num_documents"),
        ("json", lambda content: content.replace(b"tokens-1", b"tokens-9"), "tokens-9"),
    ],
)
def test_damage_is_found(tmp_path, kind, edit, said):
    path = Path(f"{write(tmp_path / 'a')}.{kind}")
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        TokenFile(tmp_path / "a").verify()
    assert said in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("position", [16, 2**63 - 2])
def test_positions_beyond_the_end_are_refused(tmp_path, position):
    path = write(tmp_path / "a").with_suffix(".idx")
    path.write_bytes(put(46, "<q", position)(path.read_bytes()))
    with pytest.raises(UserError, match="a.bin: shorter than its index says"):
        TokenFile(tmp_path / "a")


@pytest.mark.parametrize("kind", ["bin", "idx"])
def test_missing_file(tmp_path, kind):
    path = Path(f"{write(tmp_path / 'a')}.{kind}")
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        TokenFile(tmp_path / "a")


def test_rewriting_replaces_all_three_files(tmp_path):
    first = TokenFile(write(tmp_path / "a"))
    write(tmp_path / "a", [[1], [2], [3]])
    TokenFile(tmp_path / "a").verify()
    assert documents_of(TokenFile(tmp_path / "a")) == [[1], [2], [3]]
    assert documents_of(first) == DOCUMENTS  # an open map still sees the old file
