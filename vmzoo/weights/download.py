"""Downloads that survive cut connections, busy servers, full disks and other processes, and are verified.

One process at a time downloads a file, into `NAME.part`; it gets its own name when it is complete and its digest right.
What is known of the part stands beside it, so that a later call, also of another process, goes on with it.
"""

import email.utils
import errno
import logging
import os
import re
import shutil
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from email.message import Message
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from filelock import FileLock, Timeout

from .cache import (
    PartialFile,
    cache_folder,
    drive_id,
    find_cached,
    lock_of,
    place_of,
    read_record,
    record_path,
    write_record,
)
from .errors import CheckpointError
from .manifest import Digest, digest_of

_logger = logging.getLogger(__name__)

HUB = 'https://huggingface.co/'
DRIVE_DOWNLOAD = 'https://drive.usercontent.google.com/download?id={}&export=download&confirm=t'
OFFLINE = ('VMZOO_OFFLINE', 'HF_HUB_OFFLINE')

TIMEOUT = 30  # seconds without a byte
RETRIES = 4  # in a row, without progress
FIRST_WAIT = 1.0  # seconds before the second try, doubled for every other
MAX_WAIT = 120  # seconds that a server may ask to wait
BLOCK = 1 << 20
RETRIED = {408, 425, 429, 500, 502, 503, 504}
ELSEWHERE = 'set VMZOO_HOME (or cache_dir) to another folder.'
REMEDIES = {
    401: 'The file is not public: ask its publisher for access.',
    403: 'The server refuses access: the file may have been made private, or its quota is used up; try again tomorrow.',
    404: 'The publisher has moved or removed it.',
    410: 'The publisher has removed it.',
}


class _Refused(Exception):
    """The download cannot succeed: the problem, and what can be done."""

    def __init__(self, problem: object, remedy: str = '') -> None:
        super().__init__(problem, remedy)
        self.problem, self.remedy = problem, remedy


class _Interrupted(Exception):
    """The download may succeed when it is tried again, after `delay` seconds if the server says so."""

    def __init__(self, problem: object, delay: float | None = None) -> None:
        super().__init__(problem)
        self.delay = delay


def download_file(url: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the file of an address from the cache, into which it is downloaded if it is not there.

    It is compared with the digest in the manifest; if there is none, with what the Hugging Face hub states, and with
    the file that was first used. Of several processes one downloads, the others wait for it. A broken download goes on
    where it was, if the server can do that and its file has not changed.

    Args:
        url: A file's address, or its page on Google Drive.
        cache_dir: Folder to keep it in, instead of `$VMZOO_HOME/checkpoints` or torch.hub's folder.

    Raises:
        CheckpointError: The file cannot be had, or is not the right one; the message says what to do. With
            `VMZOO_OFFLINE=1` or `HF_HUB_OFFLINE=1`, that is every file which is not in the cache.
    """
    if not url.startswith(('http://', 'https://')):
        raise CheckpointError(
            f'{url} is no address that can be downloaded: it starts with neither https:// nor http://.'
        )
    folder = cache_folder(cache_dir)
    try:
        if path := find_cached(url, folder):
            return path
        if offline := next((name for name in OFFLINE if _is_set(name)), None):
            raise CheckpointError(
                f'{place_of(url, folder)}: not in the cache{_damaged(url, folder)}, and {offline} forbids downloads. '
                f'Unset it, or get {url} on another machine and save it as that file.'
            )
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(url, folder):
            return find_cached(url, folder) or _Download(url, place_of(url, folder)).run()
    except OSError as error:
        raise CheckpointError(_disk_problem(url, folder, error)) from error


def _is_set(name: str) -> bool:
    return os.environ.get(name, '').strip().lower() in ('1', 'true', 'yes', 'on')


def _damaged(url: str, folder: Path) -> str:
    return ' (the file there is not the published one)' if place_of(url, folder).exists() else ''


def _disk_problem(url: str, folder: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f'could not download {url}: no space is left for {folder} ({error.strerror}). Free some, or {ELSEWHERE}'
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f'could not download {url}: {error}. Change the permissions, or {ELSEWHERE}'
    return f'could not download {url} to {folder}: {error}. Repair that, or {ELSEWHERE}'


@contextmanager
def _locked(url: str, folder: Path) -> Iterator[None]:
    lock = FileLock(lock_of(url, folder))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _logger.info('Waiting for another process that downloads %s', url)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class _Redirects(HTTPRedirectHandler):
    """Follows redirections, but not from https to http; keeps the SHA-256 that the Hugging Face hub states."""

    sha256: str | None = None

    def redirect_request(self, req: Request, fp: HTTPResponse, code: int, msg: str, headers: Message, newurl: str):
        self.note(headers)
        if req.full_url.startswith('https:') and not newurl.startswith('https:'):
            raise _Refused(f'the server redirects to an address without encryption, {newurl}')
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def note(self, headers: Message) -> None:
        etag = headers.get('X-Linked-Etag', '').strip('"')
        self.sha256 = etag if re.fullmatch('[0-9a-f]{64}', etag) else self.sha256


class _Download:
    """One file's way into the cache, while its lock is held."""

    def __init__(self, url: str, path: Path) -> None:
        self.url, self.path = url, path
        self.published = digest_of(url)
        self.part = PartialFile.of(path, url)

    def run(self) -> Path:
        if self.path.exists():
            _logger.warning('%s is not the published file: it is removed and downloaded again.', self.path)
            self.path.unlink()
        _logger.info('Downloading %s to %s', self.url, self.path)
        try:
            with _progress_bar(self.path.name) as show:
                self._receive_all(show)
            self._check()
        except _Refused as refusal:
            raise CheckpointError(
                f'could not download {self.url}: {refusal.problem}. '
                + (f'{refusal.remedy} ' if refusal.remedy else '')
                + f'Or get the file by other means and save it as {self.path}.'
            ) from refusal
        return self.path

    def _receive_all(self, show: Callable[[int, int | None], None]) -> None:
        failures, reached = 0, self.part.size()
        while self.part.total is None or self.part.size() != self.part.total:
            try:
                return self._receive(show)
            except _Interrupted as problem:
                held = self.part.size()
                failures = 1 if held > reached else failures + 1
                reached = max(reached, held)
                if failures > RETRIES:
                    if not held:
                        self.part.discard()
                    kept = f' {held} bytes are kept, and the next call goes on from there.' if held else ''
                    raise _Refused(f'{problem} (tried {failures} times)', f'Try again later.{kept}') from problem
                delay = FIRST_WAIT * 2 ** (failures - 1) if problem.delay is None else problem.delay
                _logger.info('%s: %s; trying again in %g s', self.url, problem, delay)
                time.sleep(delay)

    def _receive(self, show: Callable[[int, int | None], None]) -> None:
        """Makes one request for what is missing, and appends what comes."""
        part, redirects = self.part, _Redirects()
        with self._open(redirects) as response:
            redirects.note(response.headers)
            block = _read(response)
            if response.status == 206 and not part.is_continued_by(response.headers):
                part.discard()
                raise _Interrupted('the file changed on the server', delay=0)
            if response.status != 206 and block.lstrip().startswith(b'<'):
                raise _web_page(block)
            try:
                if response.status != 206:
                    part.start(response.headers, redirects.sha256)
                self._check_room()
                received = self._append(block, response, show)
            except OSError:  # of the disk: those of the network are _Interrupted
                part.discard()
                raise
        if part.total is not None and received < part.total:
            raise _Interrupted(f'the connection was cut: {received} of {part.total} bytes came')

    def _append(self, block: bytes, response: HTTPResponse, show: Callable[[int, int | None], None]) -> int:
        """Writes a block and what follows it, and returns how many bytes of the file are there."""
        with self.part.path.open('ab') as file:
            while block:
                file.write(block)
                show(file.tell(), self.part.total)
                block = _read(response)
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def _open(self, redirects: _Redirects) -> HTTPResponse:
        request = Request(_direct_address(self.url), headers={'User-Agent': 'vmzoo', 'Accept-Encoding': 'identity'})
        if held := self.part.size():
            request.add_header('Range', f'bytes={held}-')
            request.add_header('If-Range', self.part.validator)
        try:
            return build_opener(redirects).open(request, timeout=TIMEOUT)
        except HTTPError as error:
            with error:
                problem = f'HTTP Error {error.code}: {error.reason}'
                if error.code == 416:
                    self.part.discard()
                    raise _Interrupted(problem, delay=0) from error
                if error.code not in RETRIED:
                    raise _Refused(problem, REMEDIES.get(error.code, '')) from error
                raise _Interrupted(problem, _retry_after(error.headers, problem)) from error
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            if isinstance(reason, ssl.SSLCertVerificationError):
                remedy = 'The certificate of the server is not trusted: see to the proxy or SSL_CERT_FILE.'
                raise _Refused(reason, remedy) from error
            raise _Interrupted(reason) from error

    def _check_room(self) -> None:
        """Before the bytes come, compares what is announced with what is published and with the free space."""
        total, folder = self.part.total, self.part.path.parent
        if total is None:
            return
        if self.published.size not in (None, total):
            self.part.discard()
            raise _Refused(f'the server has a file of {total} bytes, and {self.published.size} were published')
        missing, free = total - self.part.size(), shutil.disk_usage(folder).free
        if missing > free:
            if missing == total:
                self.part.discard()
            problem = f'no space is left: {missing / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB free in {folder}'
            raise _Refused(problem, f'Free some, or {ELSEWHERE}')

    def _check(self) -> None:
        """Gives the file its name if it is the right one, and throws it away if not."""
        part, record = self.part, read_record(self.path)
        found = Digest.of_file(part.path)
        stated = Digest(self.published.sha256 or part.sha256, self.published.size or part.total)
        problem = stated.mismatch(found)
        remedy = 'It was damaged or exchanged on its way; try again.'
        if not problem and not self.published.sha256 and record and record.sha256 != found.sha256:
            problem = f'its SHA-256 is {found.sha256} and was {record.sha256} when it was first downloaded'
            remedy = f'If you trust the new file, delete {record_path(self.path)} and try again.'
        if problem:
            part.discard()
            raise _Refused(problem, remedy)
        os.replace(part.path, self.path)
        part.discard()
        basis = 'manifest' if self.published.sha256 else 'server' if part.sha256 else 'first use'
        write_record(self.path, self.url, found.sha256, basis)


def _direct_address(url: str) -> str:
    """Returns the address of the file for a page of Google Drive; for the Hugging Face hub that of `HF_ENDPOINT`."""
    if page := drive_id(url):
        return DRIVE_DOWNLOAD.format(page)
    endpoint = os.environ.get('HF_ENDPOINT')
    return url.replace(HUB, f'{endpoint.rstrip("/")}/', 1) if endpoint and url.startswith(HUB) else url


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read1(BLOCK)
    except (OSError, HTTPException) as error:
        raise _Interrupted(f'the connection was cut: {error}') from error


def _retry_after(headers: Message, problem: str) -> float | None:
    """Returns for how many seconds the server asks to wait."""
    value = headers.get('Retry-After')
    if value is None:
        return None
    if value.isdigit():
        delay = float(value)
    else:
        try:
            delay = (email.utils.parsedate_to_datetime(value) - datetime.now(timezone.utc)).total_seconds()
        except (TypeError, ValueError):
            return None
    if delay > MAX_WAIT:
        raise _Refused(problem, f'The server asks to try again in {delay:.0f} seconds.')
    return max(delay, 0.0)


def _web_page(head: bytes) -> _Refused:
    title = re.search(rb'<title[^>]*>(.*?)</title>', head, re.IGNORECASE | re.DOTALL)
    name = f' ("{" ".join(title[1].decode(errors="replace").split())}")' if title else ''
    return _Refused(
        f'the server sent a web page{name} instead of the file',
        'It may ask for a login or a confirmation, or the quota of the file is used up: open the address in a browser.',
    )


@contextmanager
def _progress_bar(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yields a function that shows how many bytes of how many are there; on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn('{task.description}'), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
