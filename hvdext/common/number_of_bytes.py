"""A type of command-line arguments: how many bytes."""

from __future__ import annotations

import argparse
import re


def number_of_bytes(text: str) -> int:
    """What `500MB` or `2GiB` means; a type of `argparse`."""
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*(?:([kMGT]?)(i?)B)?", text.strip())
    try:
        number, unit, binary = match.groups() if match else ("", "", "")
        return int(float(number) * (1024 if binary else 1000) ** " kMGT".index(unit or " "))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a number of bytes, such as 500MB or 2GiB. Received: {text!r}."
        ) from None
