"""Reading and checking of flags, for every entry script: one clear line where something is wrong."""

import argparse
import difflib
import sys
from dataclasses import dataclass

from transformers.hf_argparser import HfArg, HfArgumentParser

from common.errors import UserError


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # where the default is None, the sentence says what happens
        return action.help if action.default in (None, argparse.SUPPRESS) else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists the flags")


@dataclass
class LaunchArguments:
    """Flags of every script that trains, beside what its launcher's YAML says. Several precisions raise UserError."""

    bf16: bool = HfArg(default=False, help="bf16 matmuls; must agree with the launcher.")
    fp16: bool = HfArg(default=False, help="fp16 with loss scaling (GPU only); must agree with the launcher.")
    fp32: bool = HfArg(default=False, help="No mixed precision; must agree with the launcher.")
    pipeline_config: str | None = HfArg(
        default=None,
        aliases=["--config_path"],
        help="PipeDream's conf.json: which layers and which processes make up each stage of a pipeline, in place of "
        "the stages in its YAML.",
    )

    def __post_init__(self):
        if self.bf16 + self.fp16 + self.fp32 > 1:
            raise UserError("--bf16, --fp16 and --fp32 contradict each other: give one")

    @property
    def precision(self):
        """What the flags ask for: "bf16", "fp16", "no" (fp32) or None (unsaid)."""
        asked = [name for flag, name in (("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "no")) if getattr(self, flag)]
        return asked[0] if asked else None


def parse(dataclasses, argv=None, **defaults):
    """Read a command line into dataclasses.

    Args:
        dataclasses: types with HfArg fields; argv: list of words without the program's name, None = sys.argv[1:].
        defaults: by field name, instead of the dataclasses' own.
    Returns:
        tuple with an object of each type.
    Raises:
        UserError: an unknown flag, a value of the wrong type.
    """
    *found, unknown = parse_known(dataclasses, argv, **defaults)
    if unknown:
        near = difflib.get_close_matches(unknown[0], flag_names(dataclasses), n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
        raise UserError(f"unknown argument {unknown[0]}: {hint}")
    return tuple(found)


def parse_known(dataclasses, argv=None, **defaults):
    """As parse, with the words that belong to none of the flags as a list behind the objects, in their order."""
    parser = _parser(dataclasses)
    parser.set_defaults(**defaults)
    argv = sys.argv[1:] if argv is None else argv
    return parser.parse_args_into_dataclasses(list(argv), return_remaining_strings=True)


def flag_names(dataclasses):
    """Every spelling of every flag of these dataclasses, sorted."""
    return sorted(_options(_parser(dataclasses)))


def drop_replaced(argv, replaced):
    """Take away flags that other scripts have and this one does not need.

    Args:
        argv: words of a command line; replaced: {flag: (values, remedy)}: values is how many words follow it, or "?"
            for one that may be absent; remedy says what does its job here.
    Returns:
        (the other words, notes): notes are lines to print, one for each such flag.
    """
    kept, notes = [], []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        if name not in replaced:
            kept.append(word)
            continue
        values, remedy = replaced[name]
        if values == "?":
            values = int(bool(words) and not words[0].startswith("-"))
        if not equals:
            del words[:values]
        notes.append(f"note: {name} is ignored: {remedy}")
    return kept, notes


def one_of(name, value, choices, note=""):
    """Raise UserError unless the value of flag `name` is among `choices`, which the message lists."""
    if value not in choices:
        raise UserError(f"--{name} {value} is unknown: choose one of {', '.join(choices)}{note}")


def at_least(args, name, bound):
    """Raise UserError where flag `name` of the dataclass is below `bound`; None passes."""
    value = getattr(args, name)
    if value is not None and not value >= bound:
        raise UserError(f"--{name} {value} is too small: give at least {bound}")


def positive(args, name):
    """Raise UserError where flag `name` is not above 0, or infinite; None passes."""
    value = getattr(args, name)
    if value is not None and not 0 < value < float("inf"):
        raise UserError(f"--{name} {value} must be above 0")


def between(args, name, low, high, lower_open=False, upper_open=False):
    """Raise UserError where flag `name` lies outside [low, high]; an open end does not belong to it."""
    value = getattr(args, name)
    inside = (low < value if lower_open else low <= value) and (value < high if upper_open else value <= high)
    if not inside:
        raise UserError(f"--{name} {value} is out of range: it must lie between {low} and {high}")


def _parser(dataclasses):
    return _Parser(dataclasses, allow_abbrev=False, formatter_class=_Help)


def _options(parser):
    return [option for action in parser._actions for option in action.option_strings]
