"""The command `hvdext`.

A sub-command is one entry of `COMMANDS`: its name, one line of help, a function that declares its
arguments and one that runs it and returns the exit code. What it needs it imports when it runs, so
that `hvdext --help` stays fast.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hvdext.common.number_of_bytes import number_of_bytes
from hvdext.engine.errors import EngineError


class CommandError(Exception):
    """What the user can put right: shown as one message."""


@dataclass(frozen=True)
class Command:
    """One sub-command.

    Attributes:
        name: what the user types.
        help: one line; the first word is a verb.
        add_arguments: declares the arguments on the sub-command's parser.
        run: does the work and returns the exit code.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code.

    Args:
        argv: the arguments after the program's name; those of the process if None.
    """
    args = make_parser().parse_args(argv)
    try:
        return args.run(args)
    except (EngineError, CommandError) as error:
        print(f"hvdext {args.command}: error: {error}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser with all sub-commands."""
    parser = argparse.ArgumentParser(prog="hvdext", description="Horovod for Keras 3.")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.help, description=command.help)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _run_doctor(args: argparse.Namespace) -> int:
    from hvdext.engine import doctor

    report = doctor.examine()
    print(doctor.as_json(report) if args.json else doctor.as_text(report))
    return 0 if report.ok else 1


def _build_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--with-mpi", action="store_true", help="build MPI in, besides Gloo")
    parser.add_argument("--with-nccl", action="store_true", help="build NCCL in, for GPUs")
    parser.add_argument("--force", action="store_true", help="build again even if it is there")
    parser.add_argument("--no-install", action="store_true", help="only put the wheel into the cache")


def _run_build(args: argparse.Namespace) -> int:
    from hvdext.engine.build import build_horovod

    build_horovod(
        with_mpi=args.with_mpi,
        with_nccl=args.with_nccl,
        force=args.force,
        install=not args.no_install,
    )
    return 0


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model that Keras has saved, such as model.keras")
    parser.add_argument("--places", type=int, required=True, help="devices or pipeline stages")
    parser.add_argument(
        "--balance",
        default="parameters",
        help="what the places get equal shares of: parameters (the default), memory, flops or measured",
    )
    parser.add_argument(
        "--pin",
        action="append",
        default=[],
        type=_pin,
        metavar="LAYERS=PLACE",
        help="keep the layers that match at a place, as in 'encoder/*=0'; may be repeated",
    )
    parser.add_argument(
        "--max-memory",
        type=number_of_bytes,
        metavar="BYTES",
        help="what no place may exceed, such as 500MB or 2GiB",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="samples held at once (default: 32)")
    parser.add_argument(
        "--slots", type=int, default=2, help="optimizer variables per trained parameter (default: 2, Adam's)"
    )
    parser.add_argument(
        "--crossing", type=float, default=1.0, help="what tensors between places weigh (default: 1)"
    )
    parser.add_argument(
        "--backward-too",
        action="store_true",
        help="let tensors go back to earlier places; for devices in one process, not for pipelines",
    )
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import it first: it registers the model's own layers; may be repeated",
    )
    parser.add_argument("--save", metavar="FILE", help="write the plan as YAML")
    parser.add_argument("--draw", metavar="FILE", help="draw the plan, as PNG")


def _run_plan(args: argparse.Namespace) -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import importlib

    import keras

    from hvdext.placement.plan.planner import plan

    try:
        sys.path.insert(0, os.getcwd())  # where the user's modules are
        for module in args.modules:
            importlib.import_module(module)
        found = plan(
            keras.models.load_model(args.model, compile=False),
            args.places,
            args.balance,
            _pins(args.pin),
            args.max_memory,
            forward_only=not args.backward_too,
            batch_size=args.batch_size,
            slots=args.slots,
            crossing=args.crossing,
        )
        print(found.table())
        if args.save:
            found.save(args.save)
        if args.draw:
            found.draw(args.draw)
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise CommandError(error) from error
    return 0


def _pin(text: str) -> tuple[str, int]:
    pattern, _, place = text.rpartition("=")
    if not pattern or not place.isdigit():
        raise argparse.ArgumentTypeError(f"must be LAYERS=PLACE, such as 'encoder/*=0'. Received: {text!r}.")
    return pattern, int(place)


def _pins(pairs: Sequence[tuple[str, int]]) -> dict[str, int]:
    pins: dict[str, int] = {}
    for pattern, place in pairs:
        if pins.setdefault(pattern, place) != place:
            raise ValueError(
                f"`pins` must not contradict each other. Received: {pattern!r} at {pins[pattern]} and "
                f"{place}."
            )
    return pins


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    from hvdext.serving import options

    options.add_arguments(parser)


def _run_serve(args: argparse.Namespace) -> int:
    from hvdext.serving import command, options

    try:
        return command.run(args)
    except options.ServeError as error:
        raise CommandError(error) from error


COMMANDS = (
    Command(
        name="doctor",
        help="Show what is installed, what works, and what to do about what does not.",
        add_arguments=_doctor_arguments,
        run=_run_doctor,
    ),
    Command(
        name="build-horovod",
        help="Build Horovod for the installed TensorFlow and install it.",
        add_arguments=_build_arguments,
        run=_run_build,
    ),
    Command(
        name="plan",
        help="Show which layers of a model go to which device or pipeline stage.",
        add_arguments=_plan_arguments,
        run=_run_plan,
    ),
    Command(
        name="serve",
        help="Serve models over HTTP from all ranks: horovodrun -np 4 hvdext serve model.keras.",
        add_arguments=_serve_arguments,
        run=_run_serve,
    ),
)


if __name__ == "__main__":
    sys.exit(main())
