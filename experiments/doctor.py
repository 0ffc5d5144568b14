"""Look at this machine and this installation: what works, what is worse than it could be, what will fail.

    python -m experiments.doctor
    python -m experiments.doctor --json
    python -m experiments.doctor --quick          # without timing pictures, for a container's health check

A line for each finding begins with ok, warning or problem. The exit code is 1 if there is a problem, else 0. (Where
another distribution's package stands in for one of the four, every command says so in one line and leaves with 2 before
it begins.)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import NoReturn

from experiments.doctor_checks import Finding, examine


class _Parser(argparse.ArgumentParser):
    """One line per mistake, as the other commands' parser; that one imports what may be broken here."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    p = _Parser(
        prog="python -m experiments.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--json", action="store_true", help="print everything as one JSON object")
    p.add_argument("--quick", action="store_true", help="leave out the timing of pictures")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    given = parser().parse_args(argv)
    findings = []
    for finding in examine(quick=given.quick):
        findings.append(finding)
        if not given.json:
            print(line(finding), flush=True)
    healthy = all(finding.level != "problem" for finding in findings)
    if given.json:
        content = {"healthy": healthy, "findings": [dataclasses.asdict(f) for f in findings]}
        print(json.dumps(content, indent=2))
    return 0 if healthy else 1


def line(finding: Finding) -> str:
    """Return a finding as the command prints it."""
    return f"{finding.level:<8} {finding.name}: {finding.text}"


if __name__ == "__main__":
    raise SystemExit(main())
