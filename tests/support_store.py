"""An object store that can be away: moto's S3 in a process of its own, behind a proxy that does as it is told."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any


class Proxy:
    """Passes connections on to a port; or refuses them, never answers, or cuts answers off.

    Attributes
    ----------
    mode : {"up", "away", "silent"}
        "away" ends connections, those that are open too; "silent" keeps them and loses what they say.
    cut : int
        As many of the next answers as this end after 300 bytes of those longer than 2 KB.
    """

    def __init__(self, target: int) -> None:
        self.target, self.mode, self.cut, self.answers = target, "up", 0, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def options(self, **words: str) -> dict[str, str]:
        """`storage_options` for Lance."""
        return {
            "aws_endpoint": f"http://127.0.0.1:{self.port}",
            "allow_http": "true",
            "aws_region": "us-east-1",
            "aws_access_key_id": "a",
            "aws_secret_access_key": "b",
            **words,
        }

    def set(self, mode: str) -> None:
        self.mode = mode
        if mode == "away":
            for connection in list(self._open):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def outage(self, seconds: float, mode: str = "away") -> Iterator[list[float]]:
        """Away from now on and for so long; yields a list that then holds the time of its end."""
        ended: list[float] = []

        def end() -> None:
            ended.append(time.monotonic())
            self.set("up")

        self.set(mode)
        timer = threading.Timer(seconds, end)
        timer.start()
        yield ended
        timer.join()

    def close(self) -> None:
        self._listener.close()
        self.set("away")

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.mode == "away":
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self.target))
            self._open |= {client, server}
            for pair in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pass, args=pair, name="proxy", daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if self.mode == "silent":
                    continue
                self.answers += answers
                if answers and self.cut and len(data) > 2048:
                    self.cut -= 1
                    target.sendall(data[:300])
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
            self._open.discard(end)


@contextlib.contextmanager
def s3() -> Iterator[int]:
    """The port of moto's S3, with a bucket named "bucket"."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while put(port, "/bucket") != 200:
            assert server.poll() is None, "moto's server has ended: is moto[server] installed?"
            assert time.monotonic() < end
            time.sleep(0.1)
        yield port
    finally:
        server.kill()
        server.wait()


def put(port: int, path: str) -> int:
    import http.client

    connection: Any = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("PUT", path, headers={"Authorization": "AWS4-HMAC-SHA256 Credential=a/1/us-east-1/s3/x"})
        return int(connection.getresponse().status)
    except OSError:
        return 0
    finally:
        connection.close()
