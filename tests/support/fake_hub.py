"""A server that answers as the Hugging Face Hub does when files of a repository are downloaded."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "a" * 40
_FILE = re.compile(r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>[^?]+)")


@contextmanager
def serve_hub(repositories: dict[str, Path]) -> Iterator[str]:
    """Serve the folder of each repository, by its OWNER/NAME; yields the address for HF_ENDPOINT.

    Each has one commit, `COMMIT`, and the branch main. GATED/NAME, whose owner is "gated", is restricted.
    """

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            match = _FILE.match(self.path)
            folder = repositories.get(match["repository"]) if match else None
            if match is None or folder is None:
                return self._refuse(401, "RepoNotFound")
            if match["repository"].startswith("gated/"):
                return self._refuse(403, "GatedRepo")
            if match["revision"] not in ("main", COMMIT):
                return self._refuse(404, "RevisionNotFound")
            file = folder / match["file"]
            if not file.exists():
                return self._refuse(404, "EntryNotFound")
            content = file.read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self._finish(content)

        do_GET = do_HEAD = _answer  # noqa: N815

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self._finish(b"")

        def _finish(self, content: bytes) -> None:
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
