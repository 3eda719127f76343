"""Rows that grow longer in the course of a run: stages, each with a length and a share of the run."""

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil

from common.errors import UserError

FLAG = "--max_seq_length_stages"
FORM = "give lengths that grow, with their shares of the run, as in 128:0.9,512:0.1"


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    length: tokens in a row. end: share of the run at which the next stage begins; a sum of shares, and exact, because
    one of floats could come a step late.
    """

    length: int
    end: Fraction


def parse_stages(text):
    """The stages of a run.

    Args:
        text: length:share,length:share,... as the flag; the last length is a multiple of all others, so that a step
            can have the same tokens in every stage.
    Returns:
        list of Stage.
    Raises:
        UserError: anything else.
    """
    wrong = UserError(f"{FLAG} {text}: {FORM}")
    try:
        pairs = [part.split(":") for part in text.split(",")]
        lengths, shares = [int(length) for length, _ in pairs], [Fraction(share) for _, share in pairs]
    except (ValueError, ZeroDivisionError) as error:
        raise wrong from error
    if len(pairs) < 2 or lengths[0] < 8 or any(after <= before for before, after in pairwise(lengths)):
        raise wrong
    if min(shares) <= 0 or sum(shares) != 1:
        raise UserError(f"{FLAG} {text}: the shares must be above 0 and 1 together; they are {float(sum(shares)):g}")
    for length in lengths:
        if lengths[-1] % length:
            raise UserError(
                f"{FLAG} {text}: {lengths[-1]} is no multiple of {length}, so steps could not have the same tokens: "
                "change one of them"
            )
    return [Stage(length, sum(shares[: number + 1])) for number, length in enumerate(lengths)]


def refuse_empty_stages(stages, steps):
    """Raise UserError where a run of so many optimizer steps would pass over one of the stages."""
    begins = 0
    for stage in stages:
        ends = ceil(stage.end * steps)
        if ends == begins:
            raise UserError(
                f"{FLAG}: --max_train_steps {steps} leaves no step for rows of {stage.length} tokens: give more "
                "steps, or that stage a larger share"
            )
        begins = ends
