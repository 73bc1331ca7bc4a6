"""Finds out what is installed and what works, and says what to do about what does not.

`gather` looks at the machine; `diagnose` is a pure function of what it found.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from hvdext.engine.fixes import PROTECTIONS
from hvdext.engine.inspection import inspect
from hvdext.engine.probe import ProbeResult, two_rank_allreduce
from hvdext.engine.record import horovod_folder, installed_record

_BUILD = "run: hvdext build-horovod"


class Status(Enum):
    """How a finding counts."""

    OK = "ok"
    NOTE = "note"  # works, but the user should know
    FAIL = "FAIL"


@dataclass(frozen=True)
class Facts:
    """What was found on this machine, before any judgement.

    Attributes:
        hvdext: version of hvdext.
        python: version and path of the interpreter.
        system: operating system and processor.
        packages: as `inspection.inspect` returns it.
        horovod_present: whether a package named horovod can be found at all.
        record: what the engine says about how it was built; None if it says nothing.
        horovodrun: path of the command that a shell would start; None if it finds none.
        mpirun: likewise.
        scripts: the folder of this interpreter's commands.
        missing_programs: what a build needs and PATH lacks.
        probes: the allreduce of two ranks, by the controller that brought them together.
    """

    hvdext: str
    python: str
    system: str
    packages: dict[str, dict[str, Any]]
    horovod_present: bool
    record: dict[str, Any] | None
    horovodrun: str | None
    scripts: str
    missing_programs: tuple[str, ...] = ()
    mpirun: str | None = None
    probes: dict[str, ProbeResult] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: what was looked at.
        status: whether it works.
        value: what was found.
        advice: what to do about it; empty if there is nothing to do.
    """

    subject: str
    status: Status
    value: str
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """All findings, in the order they are shown."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether everything works; notes do not count against it."""
        return all(finding.status is not Status.FAIL for finding in self.findings)


def examine() -> Report:
    """Gathers the facts, which takes some seconds, and judges them."""
    return diagnose(gather())


def gather() -> Facts:
    """Looks at this interpreter, its packages and, if it has a Horovod, two ranks of it."""
    packages = inspect()
    mpirun = shutil.which("mpirun")
    startable = _startable(packages["horovod"].get("built", ()), mpirun)
    return Facts(
        hvdext=metadata.version("hvdext"),
        python=f"{platform.python_version()} ({sys.executable})",
        system=platform.platform(),
        packages=packages,
        horovod_present=horovod_folder() is not None,
        record=installed_record(),
        horovodrun=shutil.which("horovodrun"),
        scripts=str(Path(sys.executable).parent),
        missing_programs=tuple(name for name in ("g++", "make") if shutil.which(name) is None),
        mpirun=mpirun,
        probes={controller: two_rank_allreduce(controller) for controller in startable},
    )


def diagnose(facts: Facts) -> Report:
    """Returns the report on some facts.

    Args:
        facts: what was found.
    """
    return Report(
        (
            Finding("hvdext", Status.OK, facts.hvdext),
            Finding("Python", Status.OK, facts.python),
            Finding("system", Status.OK, facts.system),
            _tensorflow(facts),
            *_keras(facts),
            *_horovod(facts),
        )
    )


def as_text(report: Report) -> str:
    """Returns the report for people.

    Args:
        report: what to show.
    """
    width = max(len(finding.subject) for finding in report.findings)
    lines = []
    for finding in report.findings:
        lines.append(f"{finding.status.value:>4}  {finding.subject:<{width}}  {finding.value}")
        if finding.advice:
            indent = " " * (width + 8)
            lines += textwrap.wrap(
                finding.advice,
                100,
                initial_indent=indent + "-> ",
                subsequent_indent=indent + "   ",
                break_on_hyphens=False,  # commands must stay whole
                break_long_words=False,
            )
    failed = sum(finding.status is Status.FAIL for finding in report.findings)
    lines.append("Everything works." if report.ok else f"Does not work: {failed} (the lines marked FAIL).")
    return "\n".join(lines)


def as_json(report: Report) -> str:
    """Returns the report for programs: `ok` and the list of `findings`.

    Args:
        report: what to show.
    """
    findings = [{**asdict(item), "status": item.status.value} for item in report.findings]
    return json.dumps({"ok": report.ok, "findings": findings}, indent=2)


def _tensorflow(facts: Facts) -> Finding:
    found = facts.packages["tensorflow"]
    if "error" in found:
        return Finding(
            "TensorFlow",
            Status.FAIL,
            found["error"],
            "install it: pip install tensorflow, then " + _BUILD,
        )
    return Finding("TensorFlow", Status.OK, found["version"])


def _keras(facts: Facts) -> Iterator[Finding]:
    found = facts.packages["keras"]
    if "error" in found:
        yield Finding("Keras", Status.FAIL, found["error"], "install it: pip install 'keras>=3'")
        return
    if int(found["version"].split(".")[0]) < 3:
        yield Finding(
            "Keras",
            Status.FAIL,
            found["version"],
            "hvdext works with Keras 3: pip install 'keras>=3'",
        )
        return
    yield Finding("Keras", Status.OK, found["version"])
    if found["backend"] == "tensorflow":
        yield Finding("Keras backend", Status.OK, found["backend"])
    else:
        yield Finding(
            "Keras backend",
            Status.FAIL,
            found["backend"],
            "hvdext needs the TensorFlow backend: set KERAS_BACKEND=tensorflow, or the entry "
            '"backend" in ~/.keras/keras.json',
        )


def _horovod(facts: Facts) -> Iterator[Finding]:
    found = facts.packages["horovod"]
    if not facts.horovod_present:
        yield Finding("Horovod", Status.FAIL, "not installed", _how_to_build(facts))
        return
    if "error" in found:
        yield Finding("Horovod", Status.FAIL, found["error"], _why_unusable(facts))
        return
    yield Finding("Horovod", Status.OK, found["version"])
    yield _controllers(found["built"])
    yield from _protections(facts)
    yield _horovodrun(facts)
    yield _mpirun(facts)
    for controller in _startable(found["built"], facts.mpirun):
        yield _allreduce(controller, facts.probes.get(controller))


def _how_to_build(facts: Facts) -> str:
    if not facts.missing_programs:
        return _BUILD
    programs = " ".join(facts.missing_programs)
    return f"install {programs} (Debian, Ubuntu: apt-get install {programs}), then {_BUILD}"


def _why_unusable(facts: Facts) -> str:
    built_for = None if facts.record is None else facts.record["tensorflow"]
    installed = facts.packages["tensorflow"].get("version")
    if built_for and installed and built_for != installed:
        return f"it was built for TensorFlow {built_for}, {installed} is installed; {_BUILD}"
    return _how_to_build(facts) + " --force"


def _controllers(built: list[str]) -> Finding:
    value = ", ".join(built) or "none"
    if "gloo" in built or "mpi" in built:
        return Finding("built in", Status.OK, value)
    return Finding("built in", Status.FAIL, value, f"ranks need Gloo or MPI to find each other; {_BUILD}")


def _protections(facts: Facts) -> Iterator[Finding]:
    if facts.record is None:
        yield Finding(
            "engine fixes",
            Status.NOTE,
            "not known: this Horovod was not built by hvdext",
            f"it works, with fewer protections; for all of them {_BUILD}",
        )
    present = () if facts.record is None else facts.record["fixes"]
    for fix in PROTECTIONS:
        if fix.name in present:
            yield Finding(f"fix {fix.name}", Status.OK, "in")
        else:
            yield Finding(f"fix {fix.name}", Status.NOTE, "missing", fix.without)


def _horovodrun(facts: Facts) -> Finding:
    if facts.horovodrun is None:
        return Finding(
            "horovodrun",
            Status.NOTE,
            "not on PATH",
            f'export PATH="{facts.scripts}{os.pathsep}$PATH"',
        )
    if Path(facts.horovodrun).parent != Path(facts.scripts):
        return Finding(
            "horovodrun",
            Status.NOTE,
            facts.horovodrun,
            f"this one belongs to another Python; start {facts.scripts}/horovodrun",
        )
    return Finding("horovodrun", Status.OK, facts.horovodrun)


def _mpirun(facts: Facts) -> Finding:
    if "mpi" not in facts.packages["horovod"]["built"]:
        return Finding(
            "mpirun",
            Status.OK,
            "not for this engine, which has no MPI (hvdext build-horovod --with-mpi)",
        )
    if facts.mpirun is None:
        return Finding(
            "mpirun",
            Status.NOTE if "gloo" in facts.packages["horovod"]["built"] else Status.FAIL,
            "not on PATH",
            "this engine has MPI, so horovodrun calls mpirun unless told `horovodrun --gloo`; install it "
            "(Debian, Ubuntu: apt-get install openmpi-bin)",
        )
    return Finding("mpirun", Status.OK, facts.mpirun)


def _startable(built: Sequence[str], mpirun: str | None) -> list[str]:
    """The ways to bring ranks together that this engine and this machine have."""
    return [name for name in ("gloo", "mpi") if name in built and (name == "gloo" or mpirun)]


def _allreduce(controller: str, probe: ProbeResult | None) -> Finding:
    subject = f"2 ranks, {controller}"
    if probe is None:
        return Finding(subject, Status.FAIL, "not tried", "repair what is marked above first")
    if probe.ok:
        return Finding(subject, Status.OK, f"allreduce in {probe.seconds:.0f} s: {probe.detail}")
    return Finding(
        subject,
        Status.FAIL,
        f"after {probe.seconds:.0f} s: {probe.detail}",
        "if the ranks cannot reach each other, name the network interface: horovodrun "
        "--network-interfaces lo; if Horovod fails to load, hvdext build-horovod --force",
    )
