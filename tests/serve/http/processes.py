"""Servers as processes of their own, whose memory and log can be looked at from outside."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from .conftest import until

START_S = 90.0


class Process:
    """`stretto serve` on a port, its log in a file.

    Attributes:
        url: where it listens.
    """

    def __init__(self, log: Path, *arguments: object) -> None:
        self._log = log
        command = [sys.executable, "-m", "stretto", "serve", *map(str, arguments), "--json-logs"]
        with log.open("w") as file:
            self._process = subprocess.Popen(command, stderr=file)
        until(lambda: self._process.poll() is not None or self._port() is not None, START_S)
        assert self._process.poll() is None, self._log.read_text()
        self.port = self._port()
        self.url = f"http://127.0.0.1:{self.port}"
        with self.client() as client:
            until(lambda: _answers(client), START_S)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def memory_bytes(self) -> int:
        """What it holds in memory."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])  # type: ignore[index]

    def requests(self) -> list[dict[str, Any]]:
        """The lines of its log that tell of requests."""
        return [line for line in map(json.loads, self._log.read_text().splitlines()) if "method" in line]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; returns the exit code."""
        self._process.send_signal(number)
        return self._process.wait(60)

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _port(self) -> int | None:
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self._log.read_text())
        return int(found[1]) if found else None


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def serving(log: Path, *arguments: object) -> Iterator[Process]:
    process = Process(log, *arguments)
    try:
        yield process
    finally:
        process.kill()
