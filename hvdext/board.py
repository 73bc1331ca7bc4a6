"""The job's notice board: short texts that outlive a stuck collective.

horovodrun keeps a small key-value server open for the ranks to find each other. It goes on answering
while the engine hangs, which makes it the place to ask who is missing.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request

_SECONDS = 3.0  # per request: the board must never become a wait of its own


class Board:
    """A key-value server that every rank can reach.

    Args:
        address: `host:port`.
        scope: keeps this job's keys apart from the launcher's.
    """

    def __init__(self, address: str, scope: str):
        self._url = f"http://{address}/{scope}/"

    def post(self, key: str, text: str) -> None:
        """Writes `text` under `key`. A board out of reach is not an error: the launcher may be ending."""
        request = urllib.request.Request(self._url + key, data=text.encode(), method="PUT")
        self._open(request)

    def read(self, key: str) -> str | None:
        """The text under `key`; None if there is none or the board is out of reach."""
        answer = self._open(urllib.request.Request(self._url + key))
        return None if answer is None else answer.decode()

    @staticmethod
    def _open(request):
        # No proxies: the board is the job's own.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=_SECONDS) as response:
                return response.read()
        except (urllib.error.URLError, OSError):
            return None


def launchers_board() -> Board | None:
    """The board of the launcher that started this process; None if it has none (mpirun)."""
    host = os.environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR")
    port = os.environ.get("HOROVOD_GLOO_RENDEZVOUS_PORT")
    return Board(f"{host}:{port}", "hvdext") if host and port else None
