"""The command `hvdext plan`: a plan for a saved model, printed, stored and drawn."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from hvdext.common.number_of_bytes import number_of_bytes


class PlanError(Exception):
    """What the user can put right; the message says how."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
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


def run(args: argparse.Namespace) -> int:
    """Plans, and returns the exit code.

    Args:
        args: as `add_arguments` declares them.

    Raises:
        PlanError: if a module, the model or a file cannot be read or written, or an argument breaks its rule.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras  # here: `hvdext --help` needs neither Keras nor what imports it

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
        raise PlanError(error) from error
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
