"""A server on this machine, whose answers are as good or bad as a test wants them."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Request(BaseHTTPRequestHandler):
    """A request being answered."""

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get('Range')))
        self.server.answers.get(self.path, not_found)(self)

    def reply(self, body, status=200, length=None, **headers):
        """Sends a body of the announced length, by default its own; `ETag='"a"'`, `Retry_After='3'` are headers."""
        self.send_response(status)
        self.send_header('Content-Length', str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        self.wfile.write(body)

    def reply_range(self, body, upto=None, etag='"1"', **headers):
        """Sends what is asked for, up to a byte at which the connection is cut."""
        start = 0
        if (wanted := self.headers.get('Range')) and self.headers['If-Range'] == etag:
            start = int(wanted.removeprefix('bytes=').removesuffix('-'))
            headers['Content-Range'] = f'bytes {start}-{len(body) - 1}/{len(body)}'
        status = 206 if 'Content-Range' in headers else 200
        self.reply(body[start:upto], status, length=len(body) - start, ETag=etag, **headers)

    def log_message(self, *args):
        pass


def not_found(request):
    request.reply(b'', 404)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answers):
        super().__init__(('127.0.0.1', 0), Request)
        self.answers = answers
        self.requests = []
        self.address = f'http://127.0.0.1:{self.server_port}'

    def handle_error(self, request, client_address):
        """A client that goes away, or is killed, is part of the tests."""


@contextmanager
def serving(answers):
    """Serves `path -> function that answers a Request`; yields the server with its `address` and `requests`."""
    server = Server(answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
