"""A local HTTP server that answers as vLLM and SGLang document, for a model whose next token depends on the last."""

import itertools
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np


class FakeModel:
    """Log-probabilities `[V, V]` of the next token given the last one, and what a server does wrong, in turn."""

    def __init__(self, vocab_size: int, *, sglang: bool = False, seed: int = 0) -> None:
        logits = np.random.default_rng(seed).normal(size=(vocab_size, vocab_size)) * 3
        self.logprobs = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)
        self.sglang = sglang
        self.faults: list[str] = []  # one per request, from the front: "500", "busy", "cut", "html", "slow", "400", ...
        self.requests: list[dict[str, Any]] = []
        self.max_model_len = 4096
        self.models = ["served"]
        self.lock = threading.Lock()

    def fault(self) -> str:
        with self.lock:
            return self.faults.pop(0) if self.faults else ""

    def entries(self, prompt: list[int], k: int) -> list[list[tuple[int, float]] | None]:
        """The k likeliest tokens and the prompt's own at every position; none at the first."""
        found: list[list[tuple[int, float]] | None] = [None]
        for last, token in itertools.pairwise(prompt):
            row = self.logprobs[last]
            ids = {token, *np.argsort(-row, kind="stable")[:k].tolist()}
            found.append([(i, float(row[i])) for i in ids])
        return found

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/models":
            owner = "sglang" if self.sglang else "vllm"
            return {"data": [{"id": m, "max_model_len": self.max_model_len, "owned_by": owner} for m in self.models]}
        if path == "/generate":
            prompt, k = body["input_ids"], body["top_logprobs_num"]
            rows = self.entries(prompt, k)
            own = [[None if row is None else dict(row)[t], t, None] for t, row in zip(prompt, rows, strict=True)]
            top = [None if r is None else [[lp, i, None] for i, lp in sorted(r, key=lambda e: -e[1])[:k]] for r in rows]
            meta = {"prompt_tokens": len(prompt), "input_token_logprobs": own}
            return {"text": "", "meta_info": meta | ({"input_top_logprobs": top} if k else {})}
        rows = self.entries(body["prompt"], body["prompt_logprobs"])
        shown = [
            None if r is None else {str(i): {"logprob": lp, "rank": 1, "decoded_token": "x"} for i, lp in r}
            for r in rows
        ]
        return {"object": "text_completion", "choices": [{"index": 0, "text": "", "prompt_logprobs": shown}]}


@contextmanager
def serving(model: FakeModel):
    """Yields the address of a server of `model`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send(json.dumps(model.answer(self.path, {})).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            model.requests.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            fault = model.fault()
            if fault == "slow":
                time.sleep(1.0)
            if fault in ("500", "400", "302"):
                message = {"400": b'{"error": "Requested prompt logprobs of 99, which is greater than max allowed"}'}
                return self.send(message.get(fault, b"oops"), status=int(fault))
            if fault == "busy":
                return self.send(b"later", status=503, retry_after="0")
            payload = json.dumps(model.answer(self.path, body)).encode()
            if fault == "html":
                payload = b"<html>starting</html>"
            if fault == "wrong":
                payload = json.dumps({"choices": [{"prompt_logprobs": [None] + [3] * 4}]}).encode()
            if fault == "plain":
                payload = b'{"choices": [{"text": "hello"}]}'
            self.send(payload, cut=len(payload) // 2 if fault == "cut" else None)

        def send(self, payload: bytes, *, status: int = 200, retry_after: str = "", cut: int | None = None) -> None:
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                if retry_after:
                    self.send_header("Retry-After", retry_after)
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()
                self.wfile.write(payload[:cut])
            except ConnectionError:
                pass  # the client did not wait

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
