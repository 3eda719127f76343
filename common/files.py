"""Files that must be found whole again: checksums, waiting until they are on the disk, taking their place at once."""

import os
import zlib

CHUNK_BYTES = 1 << 22


def crc32(path):
    """CRC-32 of a file's content, read piece by piece.

    Args:
        path: str or Path.
    Returns:
        int below 2**32.
    """
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value


def flush(path_or_file):
    """Return once a file or a folder's list of files is on the disk, where it survives a power failure.

    Args:
        path_or_file: str or Path of a file or folder, or a file open for writing, which stays open.
    """
    if hasattr(path_or_file, "fileno"):
        path_or_file.flush()
        os.fsync(path_or_file.fileno())
        return
    descriptor = os.open(path_or_file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path, text):
    """Write a text file that is there whole or not at all. Args: path: Path; text: str."""
    unfinished = path.with_name(f"{path.name}.tmp")
    with open(unfinished, "w") as file:
        file.write(text)
        flush(file)
    unfinished.replace(path)
