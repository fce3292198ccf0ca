"""A server on this host that wandb's own process takes for W&B: it keeps the rows of runs as W&B is documented to.

History comes as lines with an offset, which replace what is there from that offset on. Going back to a `_step` drops all
rows after it (https://docs.wandb.ai/guides/runs/rewind).
"""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Runs:
    def __init__(self) -> None:
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.upserts: list[dict[str, Any]] = []
        self.exit_codes: list[int] = []
        self.rewinds: list[tuple[str, float]] = []
        self.url = ""

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        if operation == "UpsertBucket":
            self.upserts.append(variables)
            self.history.setdefault(variables["name"], [])
            return {"upsertBucket": {"bucket": self._run(variables["name"]), "inserted": True}}
        if operation == "RewindRun":
            run, step = variables["runName"], variables["metricValue"]
            self.rewinds.append((run, step))
            if run not in self.history:
                return {"rewindRun": None}
            self.history[run] = [row for row in self.history[run] if row["_step"] <= step]
            return {"rewindRun": {"rewoundRun": self._run(run)}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/file/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        return {}

    def stream(self, run: str, sent: dict[str, Any]) -> None:
        if (lines := sent.get("files", {}).get("wandb-history.jsonl")) is not None:
            kept = self.history[run][: lines["offset"]]
            self.history[run] = kept + [json.loads(line) for line in lines["content"]]
        if sent.get("complete"):
            self.exit_codes.append(sent["exitcode"])

    def _run(self, name: str) -> dict[str, Any]:
        project = {"id": "1", "name": "vespo", "entity": {"id": "1", "name": "team"}}
        lines = len(self.history[name])
        of_run = {"id": "1", "name": name, "displayName": name, "config": "{}", "sweepName": None, "project": project}
        return {**of_run, "historyLineCount": lines}


@contextmanager
def serving(status: int = 200) -> Iterator[tuple[Runs, ThreadingHTTPServer]]:
    """`status`: of every answer; others than 200 refuse what is asked."""
    runs = Runs()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            answer: dict[str, Any] = {}
            if status != 200:
                answer = {"errors": [{"message": "permission denied"}]}
            elif self.path == "/graphql":
                asked = json.loads(body)
                (operation,) = re.findall(r"(?:query|mutation)\s+(\w+)", asked["query"])
                answer = {"data": runs.answer(operation, asked["variables"])}
            elif self.path.endswith("/file_stream"):
                runs.stream(self.path.split("/")[-2], json.loads(body))
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_PUT = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    runs.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield runs, server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
