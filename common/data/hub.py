"""Datasets of the hub, and folders laid out as one."""

from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError

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
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS_TO_REACH)
    except Exception:  # of whichever library for HTTP the hub's uses today
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


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
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{what}: cannot be read ({reason}); {remedy}") from error
