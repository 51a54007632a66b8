"""Fake W&B server on loopback: the part of the protocol that one run needs, and failures on demand."""

import gzip
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SOMEONE = {"id": "1", "name": "someone"}
BUCKET = {
    "id": "1",
    "displayName": "run",
    "project": {"id": "1", "name": "pdrunet-jax", "entity": SOMEONE},
    "historyLineCount": 0,
    "summaryMetrics": "{}",
}
RESUMED = {
    "logLineCount": 0,
    "eventsLineCount": 0,
    "eventsTail": "[]",
    "config": "{}",
    "wandbConfig": '{"t": 1}',
    "tags": [],
}
ARTIFACT = {"id": "1", "state": "COMMITTED", "artifactSequence": {"id": "1", "latestArtifact": None}}


class FakeWandb(ThreadingHTTPServer):
    """Server of one run.

    `behaviour` is "accepts", "refuses" connections, or "errors" or "hangs" at every request; "errors later" and
    "hangs later" start once the run has.
    """

    daemon_threads = True

    def __init__(self, behaviour: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviour = behaviour
        self.started = False
        self.lines: dict[int, dict[str, Any]] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.closing = threading.Event()

    @property
    def history(self) -> list[dict[str, Any]]:
        """History lines by their position in the file, where a later line replaces an earlier one."""
        return [self.lines[position] for position in sorted(self.lines)]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def fails(self) -> bool:
        return self.behaviour != "accepts" and (self.started or "later" not in self.behaviour)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: the client gave up on a request, as expected."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeWandb

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.server.fails:
            if "hangs" in self.server.behaviour:
                self.server.closing.wait(300)
                return
            self.reply(500, {})
        elif self.path.startswith("/graphql"):
            self.reply(200, {"data": self.data(json.loads(body))})
        else:
            if self.path.endswith("/file_stream"):
                chunk = json.loads(body).get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
                self.server.lines |= dict(enumerate(map(json.loads, chunk["content"]), chunk["offset"]))
            self.reply(200, {})

    do_GET = do_POST = do_PUT = answer  # noqa: N815 - the library's names

    def data(self, request: dict[str, Any]) -> dict[str, Any]:
        name, variables = request.get("operationName", ""), request.get("variables", {})
        if name == "UpsertBucket":
            self.server.started = True
            return {"upsertBucket": {"bucket": {**BUCKET, "name": variables["name"]}, "inserted": True}}
        if name == "CreateRunFiles":
            url = f"{self.server.url}/storage"
            files = [{"name": file, "uploadUrl": f"{url}/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        if name == "RunResumeStatus" and self.server.started:
            tail = json.dumps([json.dumps(line) for line in self.server.history[-1:]])
            count = {"historyLineCount": len(self.server.lines), "historyTail": tail}
            bucket = {**BUCKET, **RESUMED, **count, "name": variables["name"]}
            return {"model": {"id": "1", "name": "pdrunet-jax", "entity": SOMEONE, "bucket": bucket}}
        if name == "CreateArtifact":  # one that the server already has is not uploaded
            self.server.artifacts.append(variables)
            return {"createArtifact": {"artifact": ARTIFACT}}
        if name == "NotifyScriptableRunAlert":
            return {"notifyScriptableRunAlert": {"success": True}}
        return {
            "viewer": {"id": "1", "entity": "someone", "flags": "{}", "teams": {"edges": []}},
            "model": None,
            "project": None,
        }

    def reply(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serve(behaviour: str) -> Iterator[FakeWandb]:
    """Run a server; for "refuses", nobody listens on its port."""
    server = FakeWandb(behaviour)
    if behaviour == "refuses":
        server.socket.close()
        server.socket = socket.socket()
    else:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        if behaviour != "refuses":
            server.shutdown()
        server.server_close()
