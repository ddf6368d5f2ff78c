"""A stand-in for the server of Weights & Biases on 127.0.0.1: as much of its protocol as a run of one process needs."""

import gzip
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeWandb(ThreadingHTTPServer):
    """`manner`: serve, hang (take the request, never answer), or error (500). It may be changed while a run goes on."""

    daemon_threads = True

    def __init__(self, manner: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.manner = manner
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        """What came in: by run id, lines by step."""
        self.projects: set[str] = set()
        self.opened = threading.Event()
        """A run has been opened."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def die(self) -> None:
        """No connection is taken any more."""
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeWandb

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.server.manner == "hang":
            time.sleep(600)
        if self.server.manner == "error":
            self._answer({"error": "no"}, 500)
        elif self.path == "/graphql":
            self._answer(self._graphql(json.loads(body)))
        else:
            self._answer(self._stream(json.loads(body) if body[:1] == b"{" else {}))

    do_GET = do_PUT = do_POST

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self, content: dict[str, Any], code: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _graphql(self, asked: dict[str, Any]) -> dict[str, Any]:
        query, variables = asked["query"], asked.get("variables") or {}
        if "CreateRunFiles" in query:
            uploads = [{"name": name, "uploadUrl": f"{self.server.url}/upload"} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": uploads}}}
        if "UpsertBucket" in query:
            self.server.projects.add(variables["project"])
            self.server.opened.set()
            project = {"name": variables["project"], "entity": {"name": "us"}}
            bucket = {"id": "1", "name": variables["name"], "displayName": variables["name"], "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "RunResumeStatus" in query and (lines := self.server.history.get(variables["name"])):
            last = json.dumps(lines[max(lines)])
            tails = {"historyTail": json.dumps([last]), "eventsTail": json.dumps(["{}"]), "summaryMetrics": last}
            counts = {"historyLineCount": len(lines), "logLineCount": 0, "eventsLineCount": 1}
            config = {"config": "{}", "wandbConfig": json.dumps({"t": 1}), "name": variables["name"], "id": "1"}
            return {"data": {"model": {"id": "1", "name": "p", "entity": {"name": "us"}, "bucket": tails | counts | config}}}
        return {"data": {}}

    def _stream(self, sent: dict[str, Any]) -> dict[str, Any]:
        lines = sent.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        run_id = self.path.split("/")[-2]
        for line in map(json.loads, lines):
            self.server.history.setdefault(run_id, {})[line["_step"]] = line
        return {}
