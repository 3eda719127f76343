"""Files as streams of bytes: compressed ones, and the members of archives, read where they are, never unpacked."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from common.errors import UserError

BUFFER_BYTES = 1 << 20


class ZstdStream(io.RawIOBase):
    """Decompress zstandard of any number of frames. The library's own reader takes a cut-off frame for the end.

    Args:
        file: binary file.
    """

    def __init__(self, file):
        import zstandard

        self.file = file
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # 2 GB, zstd --long=31
        self.frame = None  # a decompression that has begun and not ended
        self.compressed = b""
        self.ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.ready:
            if not self.compressed:
                self.compressed = self.file.read(1 << 17)
            if not self.compressed:
                if self.frame:
                    raise EOFError("the last frame has no end")
                return 0
            self.frame = self.frame or self.decompressor.decompressobj()
            self.ready = memoryview(self.frame.decompress(self.compressed))
            self.compressed = b""
            if self.frame.eof:
                self.compressed, self.frame = self.frame.unused_data, None
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()


DECOMPRESSORS = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": ZstdStream,
}


@dataclass(frozen=True)
class Stream:
    """Bytes of a file or of an archive's member, decompressed.

    where: for people. name: in lower case, without what says how it is compressed. open: gives a binary file.
    """

    where: str
    name: str
    open: Callable[[], io.BufferedReader]


@contextmanager
def reading(where: str | Path) -> Iterator[None]:
    """Turn what a damaged file makes the readers raise into one line.

    Raises:
        UserError: a file that is cut off, not what its name says, or cannot be read.
    """
    import zstandard

    try:
        yield
    except (EOFError, tarfile.ReadError) as error:
        if isinstance(error, tarfile.ReadError) and "unexpected end" not in str(error):
            raise UserError(f"{where}: not a valid archive ({error}); copy or download it again") from error
        raise UserError(f"{where}: the compressed file is cut off; copy or download it again") from error
    except (zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile, zstandard.ZstdError) as error:
        suffix = Path(where).suffix
        raise UserError(f"{where}: not a valid {suffix} file ({error}); copy or download it again") from error
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error}); check the file") from error


def streams(path: Path) -> Iterator[Stream]:
    """What a file holds: itself, or the members of a .zip or .tar (also compressed), each to be read before the next.

    Args:
        path: of a file.
    Raises:
        UserError: an archive whose members would leave its folder.
    """
    name, decompress = _plain_name(path.name)
    if name.endswith(".zip"):
        yield from _zip_members(path)
    elif name.endswith(".tar"):
        yield from _tar_members(path, name, decompress)
    else:
        yield Stream(str(path), name, lambda: _buffered(decompress(open(path, "rb"))))


def _plain_name(name: str) -> tuple[str, Callable]:
    """(the name in lower case without its compression, function of a binary file that decompresses it)."""
    name = name.lower()
    if name.endswith(".tgz"):
        name = f"{name[:-4]}.tar.gz"
    suffix = PurePosixPath(name).suffix
    if suffix in DECOMPRESSORS:
        return name.removesuffix(suffix), DECOMPRESSORS[suffix]
    return name, lambda file: file


def _buffered(file):
    return io.BufferedReader(file, BUFFER_BYTES)


def _member(archive: Path, member: str, kind: str, opened: Callable) -> Stream:
    parts = PurePosixPath(member.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        raise UserError(f"{archive}: its member {member} lies outside the archive; do not use it")
    name, decompress = _plain_name(parts.name)
    name = name if "." in name else name + kind
    return Stream(f"{archive}!{member}", name, lambda: _buffered(decompress(opened())))


def _zip_members(path: Path) -> Iterator[Stream]:
    with zipfile.ZipFile(path) as archive:
        for member in sorted(archive.infolist(), key=lambda found: found.filename):
            if not member.is_dir() and member.file_size:
                yield _member(path, member.filename, "", lambda member=member: archive.open(member))


def _tar_members(path: Path, name: str, decompress: Callable) -> Iterator[Stream]:
    kind = PurePosixPath(_plain_name(name.removesuffix(".tar"))[0]).suffix  # lm_dataformat: a.jsonl.zst.tar
    with _buffered(decompress(open(path, "rb"))) as file, tarfile.open(fileobj=file, mode="r|") as archive:
        for member in archive:
            if member.isfile() and member.size:
                yield _member(path, member.name, kind, lambda member=member: archive.extractfile(member))
