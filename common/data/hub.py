"""The hub: whether it and what is on it can be had, its datasets, and folders laid out as one.

Usage: python -m common.data.hub NAME [CONFIG]
Exit code 0 if this model, or this configuration of a dataset, is in the cache or the hub can be reached; else 1.
"""

import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError, first_line

SECONDS_TO_REACH = 5


def load_dataset(name, config=None, cache_dir=None, streaming=False):
    """Load a dataset; call it inside `reading`.

    Args:
        name: id on the hub, or a folder; config: one of its configurations, None for the only one.
        cache_dir: where downloads are kept, None for the hub's own cache.
        streaming: read rows from where they lie instead of downloading them.
    Returns:
        dict of datasets by split.
    """
    import datasets

    cache_dir = str(cache_dir) if cache_dir else None
    files = None
    if Path(name).is_dir():
        files = split_files(Path(name), config)
        if files is None:
            files = datasets.load_dataset_builder(name, config, cache_dir=cache_dir).config.data_files
        config = None  # the files are all that it says; named, they are also part of the cache's key, with their dates
    else:
        work_offline_unless_reachable()
    return datasets.load_dataset(name, config, data_files=files, streaming=streaming, cache_dir=cache_dir)


def split_files(folder, config):
    """Parquet files by split, of a folder without a README.md that would say it: {split: [path below the folder]}.

    Args:
        folder: Path, with <split>.parquet or <split>-00000-of-00001.parquet in it, or in its
            subfolder named `config`.
    Returns:
        dict, or None where the datasets library is to find them.
    """
    if (folder / "README.md").exists():
        return None
    place = folder / config if config and (folder / config).is_dir() else folder
    files = {}
    for path in sorted(place.glob("*.parquet")):
        files.setdefault(path.stem.partition("-")[0], []).append(str(path.relative_to(folder)))
    return files or None


def work_offline_unless_reachable():
    """Where the hub cannot be reached, let its libraries look into their caches alone: they would try for long."""
    import datasets
    from huggingface_hub import constants

    if not datasets.config.HF_HUB_OFFLINE and not reachable():
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def reachable():
    """Whether the hub answers, wherever HF_ENDPOINT and a proxy have it be; not with HF_HUB_OFFLINE."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS_TO_REACH)
    except Exception:  # of whichever library for HTTP the hub's uses today
        return False
    return True


def in_cache(name, config=None):
    """Whether a download is there to be used without the hub.

    Args:
        name: a model's id, or with `config`, one of its configurations, a dataset's.
    Returns:
        bool: the model's config.json and weights are in the hub's cache, or the dataset in that of its library.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if config is None:
        found = try_to_load_from_cache(name, "config.json")
        return isinstance(found, str) and any(
            path.suffix in (".safetensors", ".bin") for path in Path(found).parent.iterdir()
        )
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets").expanduser()
    wanted = _letters(name)  # the folder is called owner___name, with CamelCase written as snake_case
    return any(wanted == _letters(folder.parent.name) for folder in cache.glob(f"*/{config}"))


def _letters(text):
    return re.sub("[^a-z0-9.]", "", text.lower())


@contextmanager
def reading(what, remedy):
    """Turn what the datasets library raises into one line.

    Args:
        what: the flag and the dataset; remedy: what to do.
    """
    import datasets

    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = first_line(error)
        raise UserError(f"{what}: cannot be read ({reason}); {remedy}") from error


if __name__ == "__main__":
    sys.exit(not (in_cache(*sys.argv[1:]) or reachable()))
