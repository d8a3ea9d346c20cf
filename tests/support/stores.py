"""Object stores to test with: servers that packages ship, behind a proxy that injects faults."""

import contextlib
import http.client
import os
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

BUCKET = "bucket"

# gcsfs reads it when it is imported, and would ask an address that no emulator has.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


class FaultyStore:
    """A store whose faults are chosen while it runs.

    Attributes:
        url: of a folder in it.
        environment: the variables that lead its clients here.
        failing: how many of the next requests get 503.
        away: while it is set, connections are cut without an answer.
        cut: how many of the next answers are cut in their middle.
        delay: seconds that each request takes.
        requests: (method, path, bytes of the answer) of each request so far.
    """

    def __init__(self, scheme: str, upstream: int):
        self.scheme, self._upstream = scheme, upstream
        self.failing = self.cut = 0
        self.away = threading.Event()
        self.delay = 0.0
        self.requests: list[tuple[str, str, int]] = []
        self._lock = threading.Lock()
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                store._serve(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = handle_any  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.url = f"{scheme}://{BUCKET}/folder"
        self.environment = _variables(scheme, endpoint)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        """Cuts every connection until the block ends."""
        self.away.set()
        try:
            yield
        finally:
            self.away.clear()

    def bytes_read(self, part: str) -> int:
        """Bytes of all answers to requests whose path has `part` in it."""
        return sum(size for method, path, size in self.requests if method == "GET" and part in path)

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length") or 0)
        if handler.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = _read_chunks(handler.rfile)
        else:
            body = handler.rfile.read(length)
        with self._lock:
            fails, self.failing = self.failing > 0, max(self.failing - 1, 0)
        if self.away.is_set():
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        time.sleep(self.delay)
        if fails:
            _answer(handler, 503, {}, b"")
            return
        if self.scheme == "gs" and "ifGenerationMatch=0" in handler.path:
            # The emulator does not know the condition.
            with self._lock:
                if self._has_object(handler.path, body):
                    _answer(handler, 412, {}, b'{"error": {"code": 412, "message": "exists"}}')
                    return
                status, headers, content = self._forward(handler, body)
        else:
            status, headers, content = self._forward(handler, body)
        self.requests.append((handler.command, handler.path, len(content)))
        with self._lock:
            cuts = self.cut > 0 and handler.command == "GET" and len(content) > 1
            self.cut -= cuts
        _answer(handler, status, headers, content, cut=cuts)

    def _forward(
        self, handler: BaseHTTPRequestHandler, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._upstream, timeout=60)
        headers = {
            name: value
            for name, value in handler.headers.items()
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "expect")
        }
        connection.request(handler.command, handler.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        skipped = ("connection", "transfer-encoding", "content-length", "date", "server")
        kept = {x: y for x, y in answer.getheaders() if x.lower() not in skipped}
        if handler.command == "HEAD" and (size := answer.getheader("Content-Length")):
            kept["Content-Length"] = size
        connection.close()
        return answer.status, kept, content

    def _has_object(self, path: str, body: bytes) -> bool:
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(path).query)
        if "name" in query:
            name = query["name"][0]
        else:  # of a multipart upload: it stands in the first part, as JSON
            name = body.split(b'"name": "', 1)[1].split(b'"', 1)[0].decode()
        connection = http.client.HTTPConnection("127.0.0.1", self._upstream, timeout=60)
        quoted = urllib.parse.quote(name, safe="")
        connection.request("GET", f"/storage/v1/b/{BUCKET}/o/{quoted}")
        found = connection.getresponse().status == 200
        connection.close()
        return found


def _variables(scheme: str, endpoint: str) -> dict[str, str]:
    if scheme == "s3":
        return {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    return {
        "STORAGE_EMULATOR_HOST": endpoint,  # of gcsfs and google-cloud-storage
        "TENSORSTORE_GCS_HTTP_URL": endpoint,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        "GOOGLE_CLOUD_PROJECT": "project",
    }


def _answer(
    handler: BaseHTTPRequestHandler,
    status: int,
    headers: dict[str, str],
    content: bytes,
    cut: bool = False,
) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        if handler.command != "HEAD":
            handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            handler.wfile.flush()
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)


def _read_chunks(file: Any) -> bytes:
    parts = []
    while size := int(file.readline().split(b";")[0], 16):
        parts.append(file.read(size))
        file.readline()
    file.readline()
    return b"".join(parts)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def serve(scheme: str) -> Iterator[FaultyStore]:
    """Runs a store with an empty bucket; skips the test if its package is not there."""
    with contextlib.ExitStack() as stack:
        if scheme == "s3":
            server = pytest.importorskip("moto.server")
            pytest.importorskip("s3fs")
            moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
            moto.start()
            stack.callback(moto.stop)
            port = moto.get_host_and_port()[1]
        else:
            emulator = pytest.importorskip("gcp_storage_emulator.server")
            pytest.importorskip("gcsfs")
            port = _free_port()
            gcs = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
            gcs.start()
            stack.callback(gcs.stop)
        store = FaultyStore(scheme, port)
        stack.callback(store.close)
        if scheme == "s3":
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("POST", "/moto-api/reset")
            connection.getresponse().read()
            connection.request("PUT", f"/{BUCKET}", headers={"Authorization": "AWS key:x"})
            assert connection.getresponse().status == 200
        yield store


@contextlib.contextmanager
def connected(store: FaultyStore, patience: float = 30.0) -> Iterator[FaultyStore]:
    """Leads this process's clients to a store, with instances of their own."""
    from nha_jax.storage import stores

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**store.environment, stores.PATIENCE: str(patience)}.items():
            patch.setenv(name, value)
        import fsspec

        fsspec.filesystem(store.scheme).clear_instance_cache()
        stores._file_system.cache_clear()
        yield store
    stores._file_system.cache_clear()


def environment_of(store: FaultyStore, patience: float = 30.0) -> dict[str, str]:
    """The variables of a process that uses a store."""
    return {**os.environ, **store.environment, "NHA_STORE_PATIENCE": str(patience)}
