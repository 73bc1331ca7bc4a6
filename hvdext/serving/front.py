"""The front: rank 0's process. HTTP, queues and batching in one event loop; no TensorFlow."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
import uvloop

from hvdext.comm.kv_store import KeyValueStore
from hvdext.common import log
from hvdext.common.addresses import addresses_for_others
from hvdext.common.wording import named_ranks
from hvdext.serving import options
from hvdext.serving.http.draining import CloseWhenDraining
from hvdext.serving.meeting import SCOPE, make_supervisor
from hvdext.serving.scheduler import model_names
from hvdext.serving.scheduler.core import ServingCore
from hvdext.serving.service import ServiceError, State
from hvdext.serving.supervisor import Front, FrontMissing

if TYPE_CHECKING:
    from hvdext.serving.options import Job

_log = log.logger("serve")

# horovodrun, when it is asked to end, kills the ranks 5 s after it has signalled them.
_LAUNCHER_SECONDS = 3.0
_LINGER = 0.3  # seconds in which requests that were under way when the last answer left still get a 503


def lead(job: Job) -> int:
    """Runs the front until it is asked to end; returns the exit code.

    Raises:
        options.ServeError: if it cannot start; the other ranks raise the same.
    """
    log.set_rank(0)
    log.show(logging.INFO)
    try:
        return uvloop.run(_Front(job).run())
    except (OSError, ValueError, ServiceError, options.ServeError) as error:
        if job.where.kv_store is not None:
            KeyValueStore(job.where.kv_store, SCOPE).post("front", json.dumps({"error": str(error)}))
        raise options.ServeError(error) from error


class _Server(uvicorn.Server):
    """Leaves the signals to the front, which answers what is open before the server stops."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


class _Front:
    def __init__(self, job: Job):
        self._job = job
        self._args = job.args
        self._tasks: set[asyncio.Task] = set()
        self._failure: ServiceError | None = None

    async def run(self) -> int:
        job, args = self._job, self._args
        models = model_names.parse_models(args.models)
        repository = None if args.repository is None else Path(args.repository)
        if repository is not None:
            if not repository.is_dir():
                raise ValueError(f"--repository must be a folder. Received: {args.repository!r}.")
            taken = {(model.name, model.version) for model in models}
            held = model_names.in_repository(repository)
            models += [model for model in held if (model.name, model.version) not in taken]
        listener = _listen(args.host, args.port)
        meeting = options.where_front_listens(args)
        token = os.environ[options.TOKEN] if meeting else secrets.token_hex(32)
        self._core = ServingCore(
            job.settings, token, repository, on_end=self._end_by_launcher, note=_log.info
        )
        versions = await self._core.add(models)
        self._server = self._make_server()
        addresses = await self._meet(meeting)
        if job.where.kv_store is not None:
            text = json.dumps({"addresses": addresses, "token": token})
            await asyncio.to_thread(KeyValueStore(job.where.kv_store, SCOPE).post, "front", text)
        self._supervise(Front(tuple(addresses), token))
        self._take_signals()
        self._start(self._announce(listener, versions[: len(args.models)]))
        await self._server.serve(sockets=[listener])
        await self._core.close(None if self._failure is None else str(self._failure))
        if self._failure is not None:
            raise self._failure
        _say("hvdext serve: ended")
        return 0

    # -- what it starts with -----------------------------------------------------------------------

    def _make_server(self):
        from hvdext.serving.http.api_keys import read_keys
        from hvdext.serving.http.app import make_app
        from hvdext.serving.http.http_limits import LimitedHttp

        args = self._args
        app = make_app(
            self._core,
            api_keys=read_keys(args.api_key_file) if args.api_key_file else (),
            max_request_bytes=args.max_request_bytes,
            max_held_bytes=max(args.max_queue_bytes, args.max_request_bytes),
            allowed_hosts=_allowed_hosts(args),
        )
        config = uvicorn.Config(
            CloseWhenDraining(app, self._core),
            loop="none",
            http=LimitedHttp,
            ws="none",  # a library that happens to be there would take connections over
            log_config=None,  # warnings and errors go to the standard error as they are
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,
            ssl_certfile=args.tls_cert,
            ssl_keyfile=args.tls_key,
        )
        config.load()  # reads the certificate
        return _Server(config)

    async def _meet(self, meeting):
        """Listens for the ranks; returns the addresses where they reach it."""
        if meeting is not None:
            return [(meeting[0], await self._core.start(*meeting))]
        if self._job.where.one_host:
            return [("127.0.0.1", await self._core.start("127.0.0.1"))]
        port = await self._core.start("0.0.0.0")
        return [(host, port) for host in addresses_for_others(os.environ.get("HOROVOD_GLOO_IFACE"))]

    def _supervise(self, front):
        supervisor = make_supervisor(self._job, lambda: front)

        def run():
            with contextlib.suppress(FrontMissing):  # the front itself says what happened
                supervisor.run()
            threading.Event().wait()  # the worker dies with this thread, and must not die before the process

        threading.Thread(target=run, name="hvdext-supervisor", daemon=True).start()

    async def _announce(self, listener, versions):
        """Prints the address at once, and what is served once it is; ends if nothing can be."""
        host, port = listener.getsockname()[:2]
        scheme = "https" if self._args.tls_cert else "http"
        host = f"[{host}]" if ":" in host else host
        size = self._job.where.size
        _say(
            f"hvdext serve: {scheme}://{host}:{port}, {size} rank{'s' if size > 1 else ''} "
            f"({self._args.mode}); to drain and end: kill {os.getpid()}"
        )
        try:
            await self._core.loaded(versions)
        except ServiceError as error:
            self._failure = error
            self._server.should_exit = True
            return
        await self._core.until_ready()
        for version in self._core.versions():
            if version.state is State.READY:
                ranks = named_ranks(version.ranks)
                _say(f"hvdext serve: {version.name}:{version.version} ({version.platform}) on {ranks}")
        _say("hvdext serve: ready")

    # -- how it ends -------------------------------------------------------------------------------

    def _take_signals(self):
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number):
        if number == signal.SIGINT and not self._core.live:  # a second Ctrl-C
            self._server.should_exit = self._server.force_exit = True
            return
        self._begin_to_end(signal.Signals(number).name, self._args.drain_seconds)

    def _end_by_launcher(self, reason):
        self._begin_to_end(reason, min(self._args.drain_seconds, _LAUNCHER_SECONDS))

    def _begin_to_end(self, reason, seconds):
        if self._core.live:
            _log.info(f"{reason}: answers what it has, then ends")
        self._start(self._drain(seconds))

    async def _drain(self, seconds):
        end = time.monotonic() + seconds
        await self._core.drain(max(seconds - _LINGER, 0))
        await asyncio.sleep(_LINGER)
        # What is left now are clients that do not take their answer, or do not send their request.
        self._server.config.timeout_graceful_shutdown = max(1, int(end - time.monotonic()))
        self._server.should_exit = True

    def _start(self, coroutine):
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _allowed_hosts(args):
    """On loopback, no other site may pass for this one in a browser."""
    if args.allowed_hosts is not None:
        return () if args.allowed_hosts == ("*",) else args.allowed_hosts
    return ("localhost", "127.0.0.1", "::1") if args.host in ("localhost", "127.0.0.1", "::1") else ()


def _listen(host, port):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen at {host}:{port}: {error.strerror or error}") from error


def _say(text):
    print(text, flush=True)
