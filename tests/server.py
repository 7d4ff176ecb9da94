"""A local HTTP server with programmable faults, and the archives that it serves."""

import contextlib
import hashlib
import io
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PIECE = 4096  # bytes that the server sends at once


class Server(ThreadingHTTPServer):
    """Serves `files` by path, with programmable faults.

    breaks: for each coming request, after how many bytes of the body the connection is cut; None lets it through.
    answers: for each coming request a (status, headers) to send instead.
    ranges: the Range header of every request, None where there was none.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.breaks: list[int | None] = []
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.ranges: list[str | None] = []
        self.knows_ranges, self.pause = True, 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        """Tests are quiet."""

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.ranges.append(wanted)
        if server.answers:
            status, headers = server.answers.pop(0)
            return self._answer(status, headers, b"not now")
        body = server.files.get(self.path)
        if body is None:
            return self._answer(404, {}, b"no such file")
        headers, start = {}, 0
        if server.knows_ranges and wanted:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                return self._answer(416, {"Content-Range": f"bytes */{len(body)}"}, b"")
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return self._answer(206 if start else 200, headers, body[start:])

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        limit = self.server.breaks.pop(0) if self.server.breaks and status < 400 else None
        with contextlib.suppress(ConnectionError):
            for first in range(0, len(body[:limit]), PIECE):
                self.wfile.write(body[:limit][first : first + PIECE])
                time.sleep(self.server.pause)
        self.close_connection = True


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    """A server without files, until the end of the block."""
    serving = Server()
    threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield serving
    finally:
        serving.shutdown()
        serving.server_close()


def archive_of(members: Mapping[str, bytes | str]) -> bytes:
    """A zip file of these files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def offer_coco(serving: Server, folder: Path, sums: Path) -> None:
    """Serve a folder laid out like COCO 2017 under COCO's own addresses, and write the archives' sums to a file."""
    addresses = {
        "annotations/annotations_trainval2017.zip": "annotations",
        "zips/train2017.zip": "train2017",
        "zips/val2017.zip": "val2017",
    }
    lines = []
    for address, part in addresses.items():
        body = archive_of({f"{part}/{file.name}": file.read_bytes() for file in (folder / part).iterdir()})
        serving.files[f"/{address}"] = body
        lines.append(f"{hashlib.sha256(body).hexdigest()}  {address}\n")
    sums.write_text("".join(lines))
