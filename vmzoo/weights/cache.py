"""The folder that downloads are kept in, and the record beside each file of what was found when it was checked.

A file is hashed once; afterwards its size and time of modification show that it is the same. Where nobody has published
a digest, the first download's is remembered, also when the file is deleted: another file from the same address is
refused until the record is removed.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from .errors import CheckpointError
from .manifest import Digest, digest_of

RECORD_SUFFIX = '.vmzoo.json'
PART_SUFFIX = '.part'
PARTIAL = 'partly downloaded'
BASES = {
    'manifest': 'as published',
    'server': 'as its server states',
    'first use': 'as first used, no digest is published',
}


@dataclass(frozen=True)
class Record:
    """What was found when a cached file was hashed.

    Attributes:
        url: Address that it came from.
        sha256: Digest in hexadecimal.
        basis: What the digest was compared with: `manifest`, `server` (its own statement), or nothing: `first use`.
        size: Bytes of the file when it was hashed.
        mtime_ns: Its time of modification then.
    """

    url: str
    sha256: str
    basis: str
    size: int
    mtime_ns: int

    def describes(self, path: Path) -> bool:
        """Whether the file is, by its size and time, the one that was hashed."""
        stat = path.stat()
        return (self.size, self.mtime_ns) == (stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class CachedFile:
    """A file in the cache, or what is left of one.

    Attributes:
        state: What its digest was compared with; or that it was not, that it is part of a file, or that it is deleted.
    """

    path: Path
    size: int
    url: str
    state: str


class PartialFile:
    """What was downloaded of a file, and beside it what tells whether the server's file is still the same.

    Attributes:
        total: Bytes of the whole file, None if the server did not say.
        validator: What the server accepts as `If-Range`, None if nothing: then there is nothing to go on with.
        sha256: Digest of the whole file, if the server stated one.
    """

    def __init__(self, path: Path, known: dict[str, Any]) -> None:
        self.path, self.url = path, known['url']
        self.total, self.validator, self.sha256 = (known.get(key) for key in ('total', 'validator', 'sha256'))

    @classmethod
    def of(cls, path: Path, url: str) -> 'PartialFile':
        """Returns the part of a cached file, or an empty one if what is there came from another address."""
        part = path.with_name(path.name + PART_SUFFIX)
        known = _read_json(_note_path(part))
        return cls(part, known if known.get('url') == url else {'url': url})

    def size(self) -> int:
        """Returns how many bytes need not be asked for again."""
        return self.path.stat().st_size if self.validator and self.path.is_file() else 0

    def start(self, headers: Message, sha256: str | None) -> None:
        """Empties it, and notes what the server tells of its file."""
        self.discard()
        length = headers.get('Content-Length', '')
        self.total, self.validator, self.sha256 = int(length) if length.isdigit() else None, _validator(headers), sha256
        known = {'url': self.url, 'total': self.total, 'validator': self.validator, 'sha256': self.sha256}
        _note_path(self.path).write_text(json.dumps(known), encoding='utf-8')

    def is_continued_by(self, headers: Message) -> bool:
        """Whether a partial answer (206) starts where the part ends, in the same file."""
        span = headers.get('Content-Range', '')
        same_length = span.rpartition('/')[2] in ('*', str(self.total))
        return (
            span.startswith(f'bytes {self.size()}-') and same_length and _validator(headers) in (None, self.validator)
        )

    def discard(self) -> None:
        """Deletes it."""
        for file in (self.path, _note_path(self.path)):
            file.unlink(missing_ok=True)


def _validator(headers: Message) -> str | None:
    """Returns what If-Range takes: a strong ETag, or else the date of the last change."""
    etag = headers.get('ETag', '')
    return etag if etag.startswith('"') else headers.get('Last-Modified')


def _note_path(part: Path) -> Path:
    return part.with_name(part.name + '.json')


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the folder given, or else `$VMZOO_HOME/checkpoints`, or else that of torch.hub."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if home := os.environ.get('VMZOO_HOME'):
        return Path(home).expanduser() / 'checkpoints'
    return Path(torch.hub.get_dir()) / 'checkpoints'


def place_of(url: str, folder: Path) -> Path:
    """Returns where the file of an address is kept: under its own name, unless that is another address's."""
    name = _file_name(url)
    stem, dot, suffix = name.partition('.')
    plain, distinct = folder / name, folder / f'{stem}-{_short(url)}{dot}{suffix}'
    records = {path: read_record(path) for path in (plain, distinct)}
    own = [path for path, record in records.items() if record and record.url == url]
    return own[0] if own else distinct if records[plain] else plain


def lock_of(url: str, folder: Path) -> Path:
    """Returns the file that a process locks while it downloads a file of this name."""
    return folder / f'.{_file_name(url)}.lock'


def _file_name(url: str) -> str:
    if page := drive_id(url):
        return f'google_drive_{page}'
    name = os.path.basename(urlparse(url).path)
    return f'download-{_short(url)}' if name in ('', '.', '..') else name


def _short(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:8]


def drive_id(url: str) -> str | None:
    """Returns the id of a file whose page on Google Drive the address is."""
    page = re.match(r'https://drive\.google\.com/file/d/([\w-]+)', url)
    return page and page[1]


def find_cached(url: str, folder: Path) -> Path | None:
    """Returns the file of an address if it is in the cache and is the published one.

    Raises:
        CheckpointError: Nobody has recorded what is published, and it is not the file that was first used.
        OSError: It cannot be read.
    """
    path = place_of(url, folder)
    if not path.is_file():
        return None
    published, record = digest_of(url), read_record(path)
    if record and record.describes(path) and not published.mismatch(Digest(record.sha256, record.size)):
        return path
    found = Digest.of_file(path)
    if published.mismatch(found):
        return None
    if published.sha256 is None and record and record.sha256 != found.sha256:
        raise CheckpointError(
            f'{path}: changed since it was first used: its SHA-256 was {record.sha256} and is {found.sha256}. '
            f'Delete it to download it again; or, if you trust it as it is now, delete {record_path(path)}.'
        )
    basis = 'manifest' if published.sha256 else record.basis if record else 'first use'
    write_record(path, url, found.sha256, basis)
    return path


def record_path(path: Path) -> Path:
    """Returns where the record of a cached file is."""
    return path.with_name(path.name + RECORD_SUFFIX)


def read_record(path: Path) -> Record | None:
    """Returns the record of a cached file; None if there is none that can be read."""
    try:
        return Record(**_read_json(record_path(path)))
    except TypeError:
        return None


def write_record(path: Path, url: str, sha256: str, basis: str) -> None:
    """Notes what was found; in a folder that cannot be written the file is hashed at every use."""
    stat = path.stat()
    record = Record(url, sha256, basis, stat.st_size, stat.st_mtime_ns)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(asdict(record), indent=2) + '\n', encoding='utf-8')
        os.replace(temporary, record_path(path))


def remove_cached(path: Path) -> None:
    """Deletes a file, what was downloaded of it, and its record."""
    PartialFile.of(path, '').discard()
    for file in (path, record_path(path)):
        file.unlink(missing_ok=True)


def cached_files(folder: Path, urls: Iterable[str] = ()) -> list[CachedFile]:
    """Lists the files that vmzoo downloaded or used, and those of the given addresses that others put there."""
    addresses = {place_of(url, folder): url for url in urls}
    recorded = {path.with_name(path.name.removesuffix(RECORD_SUFFIX)) for path in folder.glob(f'*{RECORD_SUFFIX}')}
    placed = {path for path in addresses if path.is_file()}
    whole = [_describe(path, addresses.get(path, '')) for path in recorded | placed]
    notes = {path: _read_json(_note_path(path)) for path in folder.glob(f'*{PART_SUFFIX}')}
    parts = [
        CachedFile(path.with_name(path.name.removesuffix(PART_SUFFIX)), path.stat().st_size, note['url'], PARTIAL)
        for path, note in notes.items()
        if 'url' in note
    ]
    return sorted(whole + parts, key=lambda file: file.path)


def _describe(path: Path, url: str) -> CachedFile:
    record = read_record(path)
    url = record.url if record else url
    if not path.is_file():
        return CachedFile(path, 0, url, 'deleted, its digest is remembered')
    size = path.stat().st_size
    if record is None:
        return CachedFile(path, size, url, 'not checked yet')
    if not record.describes(path):
        return CachedFile(path, size, url, 'changed since it was checked')
    basis = 'manifest' if digest_of(url).sha256 == record.sha256 else record.basis
    return CachedFile(path, size, url, BASES.get(basis, basis))
