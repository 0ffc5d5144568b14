"""The commands: the only place that puts environments, agents and loops together."""

import sys

from experiments.running.packages import PackagesError, check_packages

try:  # before a command imports a stranger's `agents` and fails with a traceback
    check_packages()
except PackagesError as error:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(error.exit_code) from None
