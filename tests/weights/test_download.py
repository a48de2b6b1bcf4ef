"""Downloads against a server on this machine that cuts connections, is busy, lies or changes its files."""

import email.utils
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta, timezone
from hashlib import sha256
from types import SimpleNamespace

import pytest
from local_server import serving

from vmzoo.weights import CheckpointError, cached_files, download, download_file, manifest, remove_cached
from vmzoo.weights.cache import read_record, record_path

BODY = bytes(range(256)) * 2000
DIGEST = sha256(BODY).hexdigest()
HALF = len(BODY) // 2

pytestmark = pytest.mark.usefixtures('torch_home')


@pytest.fixture
def serve():
    """`serve(first, second, ...)` answers requests of /w.pth in turn, the last one for ever; returns the server."""
    with serving({}) as server:

        def serve(*answers):
            given = iter(answers)
            lock = threading.Lock()

            def answer(request):
                with lock:
                    current = next(given, answers[-1])
                current(request)

            server.answers['/w.pth'] = answer
            server.url = f'{server.address}/w.pth'
            return server

        yield serve


@pytest.fixture
def recorded(monkeypatch):
    """Adds digests to the manifest."""
    entries = {}
    monkeypatch.setattr(manifest, '_entries', lambda: entries)
    return lambda url, **digest: entries.update({url: digest})


def good(request):
    request.reply_range(BODY)


def cut(request):
    request.reply_range(BODY, upto=HALF)


def visible(cache):
    return sorted(path.name for path in cache.iterdir() if not path.name.startswith('.'))


def refused(url, *parts, **kwargs):
    """Asserts that the download fails with one error that names address, remedy and all that is given."""
    with pytest.raises(CheckpointError) as caught:
        download_file(url, **kwargs)
    message = str(caught.value)
    assert url in message
    assert [part for part in map(str, parts) if part not in message] == [], message
    return message


def test_download_then_cache(serve, cache):
    server = serve(good)
    path = download_file(server.url)
    assert path == cache / 'w.pth' and path.read_bytes() == BODY
    assert download_file(server.url) == path
    assert server.requests == [('/w.pth', None)]
    assert visible(cache) == ['w.pth', 'w.pth.vmzoo.json']
    record = read_record(path)
    assert (record.url, record.sha256, record.basis) == (server.url, DIGEST, 'first use')


def test_folders(serve, tmp_path, monkeypatch):
    server = serve(good)
    monkeypatch.setenv('VMZOO_HOME', str(tmp_path / 'home'))
    assert download_file(server.url) == tmp_path / 'home/checkpoints/w.pth'
    assert download_file(server.url, cache_dir=tmp_path / 'mine') == tmp_path / 'mine/w.pth'


def test_verified_file_is_hashed_once(serve, monkeypatch):
    server = serve(good)
    path = download_file(server.url)
    monkeypatch.setattr(manifest.Digest, 'of_file', lambda path: pytest.fail('hashed again'))
    assert download_file(server.url) == path


def test_same_name_from_two_addresses(serve, cache):
    server = serve(good)
    server.answers['/other/w.pth'] = lambda request: request.reply(b'other')
    other = f'{server.address}/other/w.pth'
    for _ in range(2):
        assert download_file(server.url).read_bytes() == BODY
        assert download_file(other).read_bytes() == b'other'
    assert len(server.requests) == 2
    path = download_file(other)
    assert path.parent == cache and path.suffix == '.pth'
    remove_cached(cache / 'w.pth')
    assert download_file(other) == path


@pytest.mark.parametrize('path', ['/', '/..', '/.', ''])
def test_address_without_a_name(serve, cache, path):
    server = serve(good)
    server.answers[path or '/'] = good
    assert download_file(server.address + path).parent == cache


def test_no_address():
    refused('ftp://example.org/w.pth', 'neither https:// nor http://')


@pytest.mark.parametrize('terminal', [False, True])
def test_progress_bar_on_a_terminal_only(serve, monkeypatch, capsys, terminal):
    monkeypatch.setenv('FORCE_COLOR', '1') if terminal else monkeypatch.delenv('FORCE_COLOR', raising=False)
    download_file(serve(good).url)
    out, err = capsys.readouterr()
    assert not out and ('w.pth' in err and '512.0/512.0' in err if terminal else not err)


# Interrupted downloads


def test_cut_connection_goes_on(serve):
    server = serve(cut, good)
    assert download_file(server.url).read_bytes() == BODY
    assert server.requests == [('/w.pth', None), ('/w.pth', f'bytes={HALF}-')]


def test_later_call_goes_on(serve, cache, monkeypatch):
    monkeypatch.setattr(download, 'RETRIES', 0)
    server = serve(cut, good)
    refused(server.url, f'{HALF} of {len(BODY)} bytes came', f'{HALF} bytes are kept', cache / 'w.pth')
    assert [file.state for file in cached_files(cache)] == ['partly downloaded']
    assert download_file(server.url).read_bytes() == BODY
    assert server.requests[1] == ('/w.pth', f'bytes={HALF}-')
    assert visible(cache) == ['w.pth', 'w.pth.vmzoo.json']


def test_many_cuts_with_progress(serve):
    steps = [lambda request, upto=upto: request.reply_range(BODY, upto=upto) for upto in range(50000, 512000, 50000)]
    server = serve(*steps, good)
    assert download_file(server.url).read_bytes() == BODY
    assert len(server.requests) == len(steps) + 1 > download.RETRIES + 1


def test_changed_file_is_not_spliced(serve):
    changed = BODY[::-1]
    server = serve(cut, lambda request: request.reply_range(changed, etag='"2"'))
    assert download_file(server.url).read_bytes() == changed


def test_changed_file_from_a_server_that_ignores_if_range(serve):
    changed = BODY[::-1]
    span = f'bytes {HALF}-{len(BODY) - 1}/{len(BODY)}'

    def spliced(request):
        request.reply(changed[HALF:], 206, Content_Range=span, ETag='"2"')

    server = serve(cut, spliced, lambda request: request.reply(changed))
    assert download_file(server.url).read_bytes() == changed
    assert [span for _, span in server.requests] == [None, f'bytes={HALF}-', None]


@pytest.mark.parametrize('span', [f'bytes 0-{len(BODY) - 1}/{len(BODY)}', f'bytes {HALF}-{len(BODY)}/{len(BODY) + 1}'])
def test_wrong_range(serve, span):
    wrong = lambda request: request.reply(b'wrong', 206, Content_Range=span, ETag='"1"')  # noqa: E731
    server = serve(cut, wrong, good)
    assert download_file(server.url).read_bytes() == BODY


def test_server_that_ignores_range_starts_again(serve):
    server = serve(cut, lambda request: request.reply(BODY, ETag='"1"'))
    assert download_file(server.url).read_bytes() == BODY


@pytest.mark.parametrize('headers', [{}, {'ETag': 'W/"1"'}])
def test_nothing_to_recognise_a_changed_file_by(serve, headers):
    server = serve(lambda request: request.reply(BODY[:HALF], length=len(BODY), **headers), good)
    assert download_file(server.url).read_bytes() == BODY
    assert server.requests[1] == ('/w.pth', None)


def test_date_of_the_last_change(serve):
    date = 'Wed, 21 Oct 2015 07:28:00 GMT'

    def rest(request):
        assert request.headers['If-Range'] == date
        span = f'bytes {HALF}-{len(BODY) - 1}/{len(BODY)}'
        request.reply(BODY[HALF:], 206, Content_Range=span, Last_Modified=date)

    first = lambda request: request.reply(BODY[:HALF], length=len(BODY), Last_Modified=date)  # noqa: E731
    assert download_file(serve(first, rest).url).read_bytes() == BODY


def test_range_not_satisfiable(serve):
    server = serve(cut, lambda request: request.reply(b'', 416), good)
    assert download_file(server.url).read_bytes() == BODY
    assert server.requests[2] == ('/w.pth', None)


def test_slow_server_times_out_and_is_tried_again(serve, monkeypatch):
    monkeypatch.setattr(download, 'TIMEOUT', 0.2)
    over = threading.Event()

    def stalls(request):
        request.reply_range(BODY, upto=HALF)
        request.wfile.flush()
        over.wait(5)

    server = serve(stalls, good)
    assert download_file(server.url).read_bytes() == BODY
    over.set()


def test_truncated_for_ever(serve, cache):
    server = serve(lambda request: request.reply(BODY[:HALF], length=len(BODY)))
    refused(server.url, f'{HALF} of {len(BODY)} bytes came', f'tried {download.RETRIES + 1} times', cache / 'w.pth')
    assert len(server.requests) == download.RETRIES + 1
    assert visible(cache) == []


# Busy and refusing servers


@pytest.fixture
def waits(monkeypatch):
    waits = []
    monkeypatch.setattr(download.time, 'sleep', waits.append)
    return waits


def test_back_off(serve, waits, monkeypatch):
    monkeypatch.setattr(download, 'FIRST_WAIT', 1.0)
    busy = [lambda request, status=status: request.reply(b'', status) for status in (503, 500, 502, 429)]
    assert download_file(serve(*busy, good).url).read_bytes() == BODY
    assert waits == [1, 2, 4, 8]


def test_retry_after(serve, waits):
    later = email.utils.format_datetime(datetime.now(timezone.utc) + timedelta(seconds=50), usegmt=True)
    server = serve(
        lambda request: request.reply(b'', 429, Retry_After='7'),
        lambda request: request.reply(b'', 503, Retry_After=later),
        lambda request: request.reply(b'', 503, Retry_After='soon'),
        good,
    )
    assert download_file(server.url).read_bytes() == BODY
    assert waits[0] == 7 and 40 < waits[1] <= 50 and waits[2] == 0


def test_retry_much_later(serve, waits):
    server = serve(lambda request: request.reply(b'', 429, Retry_After='3600'))
    refused(server.url, 'HTTP Error 429', 'try again in 3600 seconds')
    assert not waits


@pytest.mark.parametrize(
    ('status', 'says'),
    [(404, 'moved or removed'), (410, 'removed'), (403, 'refuses access'), (401, 'not public'), (400, 'save it as')],
)
def test_refusal_is_final(serve, cache, status, says):
    server = serve(lambda request: request.reply(b'', status))
    refused(server.url, f'HTTP Error {status}', says, cache / 'w.pth')
    assert len(server.requests) == 1 and visible(cache) == []


def test_no_server(cache):
    with serving({}) as server:
        pass
    refused(f'{server.address}/w.pth', 'refused', cache / 'w.pth')
    assert visible(cache) == []


@pytest.mark.parametrize('page', [b'<html>login</html>', b'\n<!DOCTYPE html><TITLE>Google Drive -\n Quota</TITLE>'])
def test_web_page_instead_of_the_file(serve, cache, page):
    server = serve(lambda request: request.reply(page, Content_Type='text/html', ETag='"1"'))
    message = refused(server.url, 'a web page', 'in a browser', cache / 'w.pth')
    assert ('"Google Drive - Quota"' in message) == (b'Quota' in page)
    assert len(server.requests) == 1 and visible(cache) == []


def test_web_page_in_between(serve, cache, monkeypatch):
    """What was downloaded before a quota was used up is not lost."""
    monkeypatch.setattr(download, 'RETRIES', 0)
    server = serve(cut, lambda request: request.reply(b'<html>quota</html>'), good)
    refused(server.url, 'bytes are kept')
    refused(server.url, 'a web page')
    assert download_file(server.url).read_bytes() == BODY
    assert server.requests[2] == ('/w.pth', f'bytes={HALF}-')


def test_redirections(serve, monkeypatch):
    server = serve(good)
    server.answers['/moved/w.pth'] = lambda request: request.reply(b'', 302, Location='/w.pth')
    assert download_file(f'{server.address}/moved/w.pth').read_bytes() == BODY
    request = download.Request('https://example.org/w.pth')
    with pytest.raises(download._Refused, match='without encryption'):
        download._Redirects().redirect_request(request, None, 302, '', {}, 'http://example.org/w.pth')


# Digests


def test_wrong_digest(serve, cache, recorded):
    server = serve(good)
    recorded(server.url, sha256='0' * 64, size=len(BODY))
    refused(server.url, DIGEST, '0' * 64, 'try again', cache / 'w.pth')
    assert visible(cache) == []


def test_wrong_size_is_known_before_the_bytes_come(serve, cache, recorded):
    server = serve(lambda request: request.reply(BODY[:100], length=len(BODY)))
    recorded(server.url, sha256=DIGEST, size=7)
    refused(server.url, f'a file of {len(BODY)} bytes, and 7 were published')
    assert len(server.requests) == 1 and visible(cache) == []


def test_damaged_cached_file_is_downloaded_again(serve, recorded):
    server = serve(good)
    recorded(server.url, sha256=DIGEST, size=len(BODY))
    path = download_file(server.url)
    assert read_record(path).basis == 'manifest'
    path.write_bytes(BODY[::-1])
    assert download_file(server.url).read_bytes() == BODY


@pytest.mark.parametrize('etag', [DIGEST, 'f' * 64])
def test_digest_that_the_hub_states(serve, cache, etag):
    server = serve(good)
    moved = lambda request: request.reply(b'', 302, Location='/w.pth', X_Linked_Etag=f'"{etag}"')  # noqa: E731
    server.answers['/resolve/w.pth'] = moved
    url = f'{server.address}/resolve/w.pth'
    if etag == DIGEST:
        assert read_record(download_file(url)).basis == 'server'
    else:
        refused(url, DIGEST, etag)
        assert visible(cache) == []


def test_hub_through_its_mirror(serve, monkeypatch):
    server = serve(good)
    server.answers['/org/name/resolve/main/w.pth'] = good
    monkeypatch.setenv('HF_ENDPOINT', server.address)
    url = 'https://huggingface.co/org/name/resolve/main/w.pth'
    assert read_record(download_file(url)).url == url


def test_other_file_than_at_first(serve, cache):
    """Where no digest is published, the first download's counts, until its record is deleted."""
    server = serve(good, lambda request: request.reply(BODY[::-1]))
    path = download_file(server.url)
    path.unlink()
    assert [file.state for file in cached_files(cache)] == ['deleted, its digest is remembered']
    for _ in range(2):
        refused(server.url, f'was {DIGEST} when it was first downloaded', f'delete {record_path(path)}')
        assert visible(cache) == ['w.pth.vmzoo.json']
    record_path(path).unlink()
    assert download_file(server.url).read_bytes() == BODY[::-1]


def test_cached_file_that_changed(serve, cache):
    server = serve(good)
    path = download_file(server.url)
    path.write_bytes(b'other')
    assert [file.state for file in cached_files(cache)] == ['changed since it was checked']
    with pytest.raises(CheckpointError, match=r'w\.pth: changed since it was first used.*delete .*w\.pth\.vmzoo\.json'):
        download_file(server.url)
    record_path(path).unlink()
    assert download_file(server.url).read_bytes() == b'other'


def test_touched_file_is_hashed_again(serve):
    server = serve(good)
    path = download_file(server.url)
    os.utime(path, (1, 1))
    assert download_file(server.url) == path
    assert read_record(path).describes(path)


@pytest.mark.parametrize('text', ['', '[]', '{"url": 3}', '\xff'])
def test_damaged_record_counts_as_none(serve, text):
    server = serve(good)
    path = download_file(server.url)
    record_path(path).write_text(text, encoding='latin1')
    assert download_file(server.url) == path
    assert json.loads(record_path(path).read_text())['sha256'] == DIGEST


# Offline, disks


@pytest.mark.parametrize('name', download.OFFLINE)
def test_offline(serve, cache, monkeypatch, name):
    server = serve(good)
    monkeypatch.setenv(name, '1')
    refused(server.url, f'{cache / "w.pth"}: not in the cache', name, 'save it as that file')
    assert not cache.exists() and not server.requests
    cache.mkdir(parents=True)
    (cache / 'w.pth').write_bytes(BODY)
    assert download_file(server.url) == cache / 'w.pth'
    assert not server.requests


def test_disk_is_full_beforehand(serve, cache, monkeypatch):
    monkeypatch.setattr(download.shutil, 'disk_usage', lambda folder: SimpleNamespace(free=1000))
    refused(serve(good).url, 'no space is left', '0.5 MB are needed and 0.0 MB free', 'VMZOO_HOME')
    assert visible(cache) == []


def test_disk_becomes_full(serve, cache, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download.os, 'fsync', full)
    server = serve(good)
    refused(server.url, 'No space left on device', 'VMZOO_HOME')
    assert visible(cache) == []
    monkeypatch.undo()
    assert download_file(server.url, cache).read_bytes() == BODY  # the lock is free


def test_folder_that_may_not_be_written(serve, cache, monkeypatch):
    def denied(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    server = serve(good)
    monkeypatch.setattr(download.Path, 'mkdir', denied)
    refused(server.url, 'Permission denied', cache, 'VMZOO_HOME')
    assert not server.requests


def test_cached_file_in_a_folder_that_may_not_be_written(serve, cache, monkeypatch):
    """No lock is taken and no record needed."""
    cache.mkdir(parents=True)
    (cache / 'w.pth').write_bytes(BODY)

    def denied(self, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(download.Path, 'write_text', denied)
    monkeypatch.setattr(download.FileLock, 'acquire', denied)
    for _ in range(2):
        assert download_file(serve(good).url) == cache / 'w.pth'
    assert visible(cache) == ['w.pth']


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write everywhere')
def test_really_read_only_folder(serve, tmp_path):
    folder = tmp_path / 'read_only'
    folder.mkdir(mode=0o500)
    refused(serve(good).url, 'Permission denied', 'VMZOO_HOME', cache_dir=folder)


# Processes


def start(url, folder):
    """Starts a process that downloads."""
    code = 'import sys; from vmzoo.weights import download_file; print(download_file(sys.argv[1], sys.argv[2]))'
    return subprocess.Popen([sys.executable, '-c', code, url, str(folder)], stdout=subprocess.PIPE, text=True)


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_processes_download_once(serve, tmp_path, caplog):
    both = threading.Event()
    server = serve(lambda request: (both.wait(60), good(request)))
    process = start(server.url, tmp_path)
    wait_until(lambda: server.requests)
    caplog.set_level('INFO', 'vmzoo.weights.download')
    second = threading.Thread(target=download_file, args=(server.url, tmp_path))
    second.start()
    wait_until(lambda: 'Waiting for another process' in caplog.text)
    both.set()
    second.join()
    assert process.communicate(timeout=60)[0] == f'{tmp_path / "w.pth"}\n'
    assert len(server.requests) == 1


def test_failure_frees_those_that_wait(serve, cache):
    """Each of them tries for itself."""
    arrived = threading.Barrier(2)
    server = serve(lambda request: (time.sleep(0.2), request.reply(b'', 404)))

    def fails():
        arrived.wait(10)
        refused(server.url, 'HTTP Error 404')
        failures.append(1)

    failures = []
    threads = [threading.Thread(target=fails) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(failures) == len(server.requests) == 2


def test_threads_download_once(serve):
    server = serve(lambda request: (time.sleep(0.1), good(request)))
    threads = [threading.Thread(target=download_file, args=(server.url,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 1


def test_killed_process_leaves_what_the_next_one_goes_on_with(serve, tmp_path):
    sent, over = threading.Event(), threading.Event()

    def stalls(request):
        request.reply_range(BODY, upto=HALF)
        request.wfile.flush()
        sent.set()
        over.wait(60)

    server = serve(stalls, good)
    process = start(server.url, tmp_path)
    assert sent.wait(60)
    part = tmp_path / 'w.pth.part'
    wait_until(lambda: part.exists() and part.stat().st_size)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    over.set()
    held = part.stat().st_size
    assert download_file(server.url, tmp_path).read_bytes() == BODY
    assert server.requests[1] == ('/w.pth', f'bytes={held}-')


# What is in the cache


def test_list_and_remove(serve, cache, recorded):
    server = serve(good)
    path = download_file(server.url)
    (cache / 'placed.pth').write_bytes(b'placed')
    (cache / 'of_another_program.pth').write_bytes(b'unknown')
    placed = f'{server.address}/placed.pth'
    states = {file.path.name: (file.size, file.url, file.state) for file in cached_files(cache, [placed])}
    assert states == {
        'w.pth': (len(BODY), server.url, 'as first used, no digest is published'),
        'placed.pth': (6, placed, 'not checked yet'),
    }
    recorded(server.url, sha256=DIGEST, size=len(BODY))
    assert [file.state for file in cached_files(cache)] == ['as published']
    remove_cached(path)
    assert visible(cache) == ['of_another_program.pth', 'placed.pth']
    assert cached_files(cache / 'none') == []
