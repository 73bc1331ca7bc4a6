"""The command `hvdext`.

A sub-command is one entry of `COMMANDS`: its name, one line of help, a function that declares its
arguments and one that runs it and returns the exit code. What it needs it imports when it runs, so
that `hvdext --help` stays fast.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    from hvdext.placement.plan import command

    command.add_arguments(parser)


def _run_plan(args: argparse.Namespace) -> int:
    from hvdext.placement.plan import command

    try:
        return command.run(args)
    except command.PlanError as error:
        raise CommandError(error) from error


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
