"""The arguments of `hvdext serve`: declared, and checked alike on every rank."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvdext.common.number_of_bytes import number_of_bytes

if TYPE_CHECKING:  # `hvdext --help` needs neither
    from hvdext.common.launcher import RankInfo
    from hvdext.serving.settings import Settings

TOKEN = "HVDEXT_SERVE_TOKEN"
_TOKEN_LENGTH = 16


class ServeError(Exception):
    """What the user can put right; the message says how."""


@dataclass(frozen=True)
class Job:
    """What all ranks agree on, since all have the same arguments.

    Attributes:
        args: the command's.
        where: this rank's.
        settings: how the ranks serve.
        threads: of each worker.
    """

    args: argparse.Namespace
    where: RankInfo
    settings: Settings
    threads: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    add = parser.add_argument
    add(
        "models",
        nargs="*",
        metavar="[NAME[:VERSION]=]MODEL",
        help="a .keras file or a SavedModel's folder; its name is the file's, its version 1, unless given",
    )
    add("--repository", metavar="DIR", help="folder with NAME.keras, NAME/VERSION/model.keras or SavedModels")
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this host only)")
    add("--port", type=int, default=8000, help="port to listen at; 0: a free one (default: 8000)")
    add(
        "--mode",
        default="replicas",
        help="replicas (the default): each rank has the whole model; or pipeline",
    )
    add("--max-batch-size", type=int, metavar="ROWS", help="rows computed together (default: 32)")
    add(
        "--max-delay-ms", type=float, default=2.0, metavar="MS", help="how long to wait for more (default: 2)"
    )
    add(
        "--batch-sizes",
        type=_sizes,
        default=(),
        metavar="N,N,...",
        help="fill batches up to these sizes only",
    )
    add(
        "--mix-requests",
        default="auto",
        help="auto (the default): compute requests together where rows do not depend on each other; always; "
        "never",
    )
    add("--max-queue", type=int, default=1000, metavar="N", help="requests that may wait (default: 1000)")
    add(
        "--max-queue-bytes",
        type=number_of_bytes,
        default=512 << 20,
        metavar="BYTES",
        help="and their size (512MiB)",
    )
    add("--timeout", type=float, default=30.0, metavar="S", help="seconds per request (default: 30)")
    add("--batch-timeout", type=float, default=60.0, metavar="S", help="before a rank counts as hung (60)")
    add("--load-timeout", type=float, default=600.0, metavar="S", help="for loading a model (default: 600)")
    add("--start-timeout", type=float, default=120.0, metavar="S", help="to wait for rank 0 (default: 120)")
    add(
        "--drain-seconds", type=float, default=30.0, metavar="S", help="for the last answers, at the end (30)"
    )
    add("--api-key-file", metavar="FILE", help="one key per line; requests must carry one")
    add("--tls-cert", metavar="FILE", help="certificate chain, PEM")
    add("--tls-key", metavar="FILE", help="its private key, PEM")
    add(
        "--max-request-bytes",
        type=number_of_bytes,
        default=64 << 20,
        metavar="BYTES",
        help="per request (64MiB)",
    )
    add(
        "--allowed-hosts",
        type=_names,
        metavar="NAME,...",
        help="Host headers to answer; * for any (default: on loopback its names, otherwise any)",
    )
    add(
        "--threads", type=int, metavar="N", help="of each rank's TensorFlow (default: cores / ranks per host)"
    )
    add(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import it first: it registers the models' own layers; may be repeated",
    )
    add(
        "--coordinator",
        metavar="HOST:PORT",
        help=f"where rank 0 listens for the others, without horovodrun; the secret is in ${TOKEN}",
    )


def check(args: argparse.Namespace, environ: Mapping[str, str]) -> Job:
    """What the arguments mean, checked as far as every rank can.

    Raises:
        ServeError: if one breaks its rule.
    """
    from hvdext.common.launcher import rank_info
    from hvdext.serving.scheduler import model_names
    from hvdext.serving.settings import Settings

    try:
        where = rank_info(environ)
        largest = args.batch_sizes[-1] if args.batch_sizes else 32
        settings = Settings(
            mode=args.mode,
            size=where.size,
            max_batch_size=largest if args.max_batch_size is None else args.max_batch_size,
            max_delay=args.max_delay_ms / 1000,
            batch_sizes=args.batch_sizes,
            mix_requests=args.mix_requests,
            max_queue=args.max_queue,
            max_queue_bytes=args.max_queue_bytes,
            timeout=args.timeout,
            batch_timeout=args.batch_timeout,
            load_timeout=args.load_timeout,
        )
        model_names.parse_models(args.models)
    except ValueError as error:
        raise ServeError(error) from error
    if not args.models and args.repository is None:
        raise ServeError("a model or --repository must be given. Received: neither.")
    if not 0 <= args.port < 65536:
        raise ServeError(f"--port must be 0 to 65535. Received: {args.port}.")
    if (args.tls_cert is None) != (args.tls_key is None):
        given = "--tls-cert" if args.tls_cert else "--tls-key"
        raise ServeError(f"--tls-cert and --tls-key belong together. Received: {given} only.")
    for name in ("drain_seconds", "start_timeout"):
        value = getattr(args, name)
        if not 0 < value < float("inf"):
            raise ServeError(f"--{name.replace('_', '-')} must be more than 0 seconds. Received: {value}.")
    _check_meeting(args, where, environ)
    return Job(args, where, settings, _threads(args, where, environ))


def where_front_listens(args: argparse.Namespace) -> tuple[str, int] | None:
    """Host and port of --coordinator.

    Raises:
        ServeError: if it has none.
    """
    if args.coordinator is None:
        return None
    host, _, port = args.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ServeError(f"--coordinator must be HOST:PORT. Received: {args.coordinator!r}.")
    return host, int(port)


def _check_meeting(args, where, environ):
    address = where_front_listens(args)
    if address is None:
        if where.size > 1 and where.kv_store is None:
            raise ServeError(
                f"this launcher has no key-value server for {where.size} ranks to meet at: start them with "
                "horovodrun, or give --coordinator HOST:PORT, where rank 0 listens."
            )
        return
    length = len(environ.get(TOKEN, ""))
    if length < _TOKEN_LENGTH:
        raise ServeError(
            f"--coordinator needs a secret of {_TOKEN_LENGTH} characters or more in ${TOKEN}, the same on "
            f"all ranks. Received: {length} characters."
        )


def _threads(args, where, environ):
    text = environ.get("HVDEXT_SERVE_THREADS")
    if args.threads is None and text is None:
        return max(1, len(os.sched_getaffinity(0)) // where.local_size)
    threads = args.threads if args.threads is not None else text
    if not str(threads).isdigit() or int(threads) < 1:
        raise ServeError(f"--threads ($HVDEXT_SERVE_THREADS) must be 1 or more. Received: {threads!r}.")
    return int(threads)


def _sizes(text):
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be sizes such as 1,8,32. Received: {text!r}.") from None


def _names(text):
    return tuple(part.strip() for part in text.split(",") if part.strip())
