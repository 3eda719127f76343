"""Downloads that continue where they stopped, try again after a while, and are compared with what was promised."""

import hashlib
import time
from pathlib import Path

import filelock
import requests

from common.errors import UserError, first_line

ATTEMPTS, FIRST_WAIT = 6, 1.0  # seconds; each wait is twice the one before
BLOCK_BYTES = 1 << 16  # what is lost where a connection ends in the middle of one
SECONDS_TO_ANSWER = 30
SECONDS_BETWEEN_REPORTS = 30
PASSING = {408, 425, 429, 500, 502, 503, 504}  # status codes that may be others in a while


class NotYet(Exception):
    """What may go better after a wait."""


def remote_size(url, headers=None):
    """Bytes that a URL promises, None where it does not say or does not answer."""
    try:
        answer = requests.head(url, headers=headers, timeout=SECONDS_TO_ANSWER, allow_redirects=True)
    except requests.RequestException:
        return None
    size = answer.headers.get("Content-Length", "") if answer.ok else ""
    return int(size) if size.isdigit() else None


def download(url, path, say, sha256=None, headers=None):
    """Download a file, unless it is there; nothing stands under its name before it is whole.

    Args:
        url: of http or https; path: Path; say: function that prints a line.
        sha256: of the file, where it is known; headers: for the server.
    Raises:
        UserError: the server refuses, answers with a web page or another file than the checksum's, or does not answer.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return
        part = path.with_name(f"{path.name}.part")
        for attempt in range(ATTEMPTS):
            try:
                _fetch(url, part, say, headers)
                break
            except (NotYet, requests.RequestException) as error:
                reason = first_line(error)
                if attempt == ATTEMPTS - 1:
                    raise UserError(
                        f"{url}: not downloaded in {ATTEMPTS} attempts ({reason}); try again later: it continues, or "
                        "give a file that you have with --input"
                    ) from error
                wait = FIRST_WAIT * 2**attempt
                say(f"download of {path.name} stopped ({reason}); again in {wait:.0f} s")
                time.sleep(wait)
            except OSError as error:
                raise UserError(f"{part}: cannot be written ({error.strerror or error}); make room") from error
        _compare(url, part, sha256)
        part.replace(path)
        _tag_of(part).unlink(missing_ok=True)


def _tag_of(part):
    return part.with_name(f"{part.name}.etag")


def _fetch(url, part, say, headers):
    """Append what is missing of a file. Raises: NotYet, requests.RequestException, OSError, UserError."""
    had, tag = part.stat().st_size if part.exists() else 0, _tag_of(part)
    wanted = dict(headers or {}, **{"Accept-Encoding": "identity"})
    if had and tag.exists():  # otherwise it may be the beginning of another version
        wanted |= {"Range": f"bytes={had}-", "If-Range": tag.read_text()}
    with requests.get(url, headers=wanted, stream=True, timeout=SECONDS_TO_ANSWER) as answer:
        if answer.status_code == 416:  # there is no more, or it has become another file
            part.unlink()
            raise NotYet("the server has another file than the one begun")
        if answer.status_code in PASSING:
            raise NotYet(f"the server answers {answer.status_code} {answer.reason}")
        if not answer.ok:
            raise UserError(f"{url}: the server answers {answer.status_code} {answer.reason}; check the address")
        if answer.headers.get("Content-Type", "").startswith("text/html") and ".htm" not in part.name:
            raise UserError(f"{url}: the server answers with a web page, not with the file; check the address")
        continued = answer.status_code == 206
        had = had if continued else 0
        length = answer.headers.get("Content-Length", "")
        total = had + int(length) if length.isdigit() else None
        if not continued:
            tag.unlink(missing_ok=True)
        if answer.headers.get("ETag", "").startswith('"'):  # a weak one does not vouch for every byte
            tag.write_text(answer.headers["ETag"])
        _copy(answer, part, had, total, say)
    if total is not None and part.stat().st_size != total:
        raise NotYet(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes")


def _copy(answer, part, had, total, say):
    began = last_report = time.monotonic()
    name, got = part.name.removesuffix(".part"), had
    promised = f" of {total / 1e6:,.0f} MB" if total is not None else ""
    say(f"download of {name}: {'continued at ' + format(had / 1e6, ',.0f') + ' MB' if had else 'begun'}{promised}")
    with open(part, "ab" if had else "wb") as file:
        for block in answer.iter_content(BLOCK_BYTES):
            file.write(block)
            got += len(block)
            if time.monotonic() - last_report >= SECONDS_BETWEEN_REPORTS:
                last_report = time.monotonic()
                rate = (got - had) / (last_report - began)
                left = f", {(total - got) / rate / 60:.0f} min left" if total is not None and rate else ""
                say(f"download of {name}: {got / 1e6:,.0f} MB{promised}, {rate / 1e6:.1f} MB/s{left}")


def _compare(url, part, sha256):
    if sha256 is None:
        return
    with open(part, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        part.unlink()
        raise UserError(
            f"{url}: the file's SHA-256 is {found}, not {sha256}; it was removed: download it again, or correct "
            "--checksums"
        )


def read_checksums(path):
    """What a file as sha256sum writes it says: {name: SHA-256}.

    Raises:
        UserError: no such file, or a line that is none of its.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--checksums {path}: cannot be read ({first_line(error)}); check the path") from error
    found = {}
    for number, line in enumerate(lines, start=1):
        checksum, _, name = line.strip().partition(" ")
        if len(checksum) != 64 or not name.strip(" *"):
            raise UserError(f"--checksums {path}:{number}: not a line of sha256sum, which are: SHA-256, name")
        found[Path(name.strip(" *")).name] = checksum.lower()
    return found
