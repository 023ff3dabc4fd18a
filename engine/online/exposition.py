"""Metrics of several processes as one page: each worker's in Prometheus' text format, told apart by a label."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CONTENT_TYPE_LATEST

from engine.core.errors import ConfigError

_log = logging.getLogger(__name__)

_END_OF_NAME = re.compile(r"[{ ]")


def merged(own: str, workers: Mapping[str, str]) -> str:
    """Return one page of several, in which each family of metrics has its HELP and TYPE once and all samples together.

    Args:
        own: a page whose samples stay as they are.
        workers: worker -> its page, whose samples get the label `worker`.
    """
    headers: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for worker, text in ((None, own), *workers.items()):
        family = ""
        for line in text.splitlines():
            if line.startswith("# "):
                _, kind, name, _ = f"{line} ".split(" ", 3)
                family = name
                header = headers.setdefault(family, [])
                samples.setdefault(family, [])
                if not any(known.startswith(f"# {kind} ") for known in header):
                    header.append(line)
            elif line:
                samples.setdefault(family, []).append(line if worker is None else _labelled(line, worker))
    lines = [line for family, found in samples.items() for line in (*headers.get(family, ()), *found)]
    return "".join(f"{line}\n" for line in lines)


def _labelled(sample: str, worker: str) -> str:
    """Put the label in front of a sample's others, which need not be understood for that."""
    found = _END_OF_NAME.search(sample)
    end = len(sample) if found is None else found.start()
    name, rest = sample[:end], sample[end:]
    if not rest.startswith("{"):
        return f'{name}{{worker="{worker}"}}{rest}'
    return f'{name}{{worker="{worker}"{"" if rest.startswith("{}") else ","}{rest[1:]}'


class MetricsPage:
    """An HTTP server, on threads of its own, that answers every GET with what a function returns.

    Attributes:
        port: where.
    """

    def __init__(self, host: str, port: int, text: Callable[[], str]) -> None:
        """Listen and answer.

        Raises:
            ConfigError: if the address cannot be listened on.
        """

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # the library's name
                try:
                    body, status = text().encode(), 200
                except Exception as error:  # who collects is told, and asks again
                    _log.exception("the metrics cannot be collected")
                    body, status = f"{error!r}\n".encode(), 503
                self.send_response(status)
                self.send_header("Content-Type", CONTENT_TYPE_LATEST if status == 200 else "text/plain")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        try:
            self._server = _Server((host, port), Handler)
        except OSError as error:
            text_ = f"cannot listen on {host}:{port}: {error.strerror}"
            raise ConfigError(text_, "server.metrics_port") from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of callers that hang up."""
