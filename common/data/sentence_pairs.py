"""Rows of two texts, [CLS] A [SEP] B [SEP], of which a model says whether B follows A.

P pieces in the file, R rows, B rows in a batch, S tokens in a row.

A piece is a sentence, or a part of one that is longer than half a row. A row is as many consecutive pieces of one
document as fit; where A ends and B begins, their order, or another document's B, depend on the row's key.
"""

import numpy as np

from common.data.masking import PAIR_STREAM, derive_key, random_bits
from common.data.ranges import ranges
from common.errors import UserError

SPECIALS = 3  # in a row
REMEDY = "prepare the text with prepare_pile_data.py --split_sentences"


class SentencePairs:
    """Rows as those of common.data.packing, which differ from epoch to epoch.

    Args:
        token_file: common.data.token_files.TokenFile, one sequence for each sentence.
        frame: Frame with [CLS], [SEP] and padding.
        seq_length: S.
        objective: "sop": A and B, or B and A (Lan et al. 2020, arXiv:1909.11942, section 3.1); "nsp": A and B, or A
            and the B of another document (Devlin et al. 2019, section 3.1). Both are as frequent.
    Raises:
        UserError: a file of whole documents, or one without enough documents of two sentences.
    """

    full = False

    def __init__(self, token_file, frame, seq_length, objective):
        _refuse_documents(token_file)
        self.frame, self.seq_length, self.objective = frame, seq_length, objective
        self.tokens, room = np.asarray(token_file.tokens), seq_length - SPECIALS
        longest = room // 2  # so that any two fit
        pieces = -(-token_file.lengths.astype(np.int64) // longest)  # of each sentence
        skipped = ranges(np.zeros_like(pieces), pieces) * longest
        lengths = np.minimum(np.repeat(token_file.lengths, pieces) - skipped, longest)
        self.starts = np.repeat(token_file.starts, pieces) + skipped  # [P]
        self.before = np.concatenate([[0], np.cumsum(lengths)])  # [P + 1] tokens of the pieces before each
        bounds = np.concatenate([[0], np.cumsum(pieces)])[token_file.documents]
        _refuse_scattered(token_file, self.starts, lengths, bounds)
        self.document, self.first, self.last = _cut(self.before, bounds, room)  # [R], with pieces first to last - 1
        if not len(self.first) or (objective == "nsp" and self.document[0] == self.document[-1]):
            needed = "two documents" if objective == "nsp" else "a document"
            raise UserError(f"{token_file.prefix}: --sentence_objective {objective} needs {needed} of two sentences")

    def __len__(self):
        return len(self.first)

    def text_tokens(self, rows, keys):
        """[B] int64: tokens of text in each row."""
        return self._pairs(rows, keys)[1].sum(axis=1)

    def real_tokens(self, rows, keys):
        """[B] int64: tokens in each row, special tokens included, padding not."""
        return self.text_tokens(rows, keys) + SPECIALS

    def build(self, rows, keys):
        """The content of some rows.

        Args:
            rows: [B] int64 row numbers; keys: [B] uint64.
        Returns:
            dict: of [B, S] input_ids, position_ids, token_type_ids (1 from B on), document_ids int64 (0 = padding),
            is_text bool; of [B, 1] cls_positions int64, sentence_labels int64 (0: B follows A) and sentence_weights
            float32, 1.
        """
        starts, lengths, changed = self._pairs(rows, keys)
        place = np.arange(self.seq_length)
        first_end = lengths[:, :1] + 1  # where the first [SEP] is
        last_end = first_end + lengths[:, 1:] + 1
        second = (place > first_end) & (place <= last_end)
        used = place <= last_end
        is_text = used & (place != first_end) & (place != last_end) & (place > 0)
        begins = np.where(second, starts[:, 1:] - first_end - 1, starts[:, :1] - 1)  # what is added to a place
        input_ids = self.tokens.take(place + begins, mode="clip").astype(np.int64)
        input_ids[~used] = self.frame.pad_id
        input_ids[:, 0] = self.frame.first_id
        for end in (first_end, last_end):
            np.put_along_axis(input_ids, end, self.frame.last_id, axis=1)
        return {
            "input_ids": input_ids,
            "position_ids": place * used,
            "document_ids": used.astype(np.int64),
            "token_type_ids": second.astype(np.int64),
            "is_text": is_text,
            "cls_positions": np.zeros((len(rows), 1), np.int64),
            "sentence_labels": changed[:, None].astype(np.int64),
            "sentence_weights": np.ones((len(rows), 1), np.float32),
        }

    def _pairs(self, rows, keys):
        """(starts, lengths) of the two texts in the file, [B, 2] each; and whether the second does not follow, [B]."""
        draws = random_bits(derive_key(keys, PAIR_STREAM)[:, None], np.arange(4))
        first, split, last = self.first[rows], self._split(rows, draws[:, 0]), self.last[rows]
        starts = np.stack([self.starts[first], self.starts[split]], axis=1)
        lengths = np.stack([self.before[split] - self.before[first], self.before[last] - self.before[split]], axis=1)
        changed = draws[:, 1] < np.uint64(1 << 63)
        if self.objective == "sop":
            starts[changed], lengths[changed] = starts[changed, ::-1], lengths[changed, ::-1]
        else:
            other = self._of_another_document(rows, draws[:, 2])
            split = self._split(other, draws[:, 3])
            room = self.seq_length - SPECIALS - lengths[:, 0]
            length = np.minimum(self.before[self.last[other]] - self.before[split], room)
            starts[changed, 1], lengths[changed, 1] = self.starts[split][changed], length[changed]
        return starts, lengths, changed

    def _split(self, rows, draws):
        """[B] int64: the piece with which the second text of each row begins, all but the first alike."""
        return self.first[rows] + 1 + _below(draws, self.last[rows] - self.first[rows] - 1)

    def _of_another_document(self, rows, draws):
        """[B] int64: a row of another document for each row, all alike."""
        own = np.searchsorted(self.document, self.document[rows])
        number = np.searchsorted(self.document, self.document[rows], side="right") - own
        other = _below(draws, len(self) - number)
        return other + np.where(other >= own, number, 0)


def _below(draws, bounds):
    """Random numbers in [0, bound) from 64 random bits each."""
    return (draws % bounds.astype(np.uint64)).astype(np.int64)


def _cut(before, bounds, room):
    """Cut documents into rows: as many pieces as fit, one after another; one that is left over alone takes the piece
    in front of it along. Documents of a single piece make no row.

    Args:
        before: [P + 1] tokens before each piece; bounds: [d + 1] pieces before each document; room: tokens in a row.
    Returns:
        (document, first, last), each [R] int64, in the order of the file.
    """
    reach = np.searchsorted(before, before[:-1] + room, side="right") - 1  # [P] behind the last piece that fits
    document = np.flatnonzero(np.diff(bounds) > 1)
    at, end = bounds[document], bounds[document + 1]
    rows = [(document[:0],) * 3]
    while len(document):  # one row of each document that is not yet cut to its end
        stop = np.minimum(reach[at], end)
        rows.append((document, at - (end - at == 1), stop))
        more = stop < end
        document, at, end = document[more], stop[more], end[more]
    document, first, last = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    order = np.argsort(first)
    return document[order], first[order], last[order]


def _refuse_documents(token_file):
    unit = (token_file.metadata or {}).get("unit", "sentence")  # Megatron's tools leave no metadata
    if unit != "sentence" or (np.diff(token_file.documents) < 2).all():
        raise UserError(
            f"{token_file.prefix}.bin holds whole documents, --sentence_objective needs sentences: {REMEDY}"
        )


def _refuse_scattered(token_file, starts, lengths, bounds):
    """Raise UserError where the sentences of a document do not lie one behind the other."""
    in_line = starts[1:] == starts[:-1] + lengths[:-1]
    in_line[bounds[(bounds > 0) & (bounds < len(starts))] - 1] = True
    if not in_line.all():
        raise UserError(f"{token_file.prefix}.idx: the sentences of a document do not follow each other: {REMEDY}")
