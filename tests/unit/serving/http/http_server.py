"""A server over real sockets."""

import contextlib
import socket
import threading
import time

import uvicorn

from hvdext.serving.http.app import make_app
from hvdext.serving.http.http_limits import LimitedHttp


@contextlib.contextmanager
def serving(service, **settings):
    """The address of a server in a thread, whose connections are those of the front."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        config = uvicorn.Config(
            make_app(service, **settings),
            http=LimitedHttp,
            ws="none",
            lifespan="off",
            timeout_keep_alive=75,
            log_level="critical",
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
