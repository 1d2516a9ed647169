"""The program `dynflow`. Where the library is installed without the platform, it says how to get it."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import distribution


def main() -> None:
    """Run the command line."""
    try:
        cli = importlib.import_module("ci_platform.cli")  # here: what it imports may not be installed
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in {"dynflow", "pipelines", "ci_platform"}:
            raise
        version = distribution("dynflow").version
        sys.exit(
            f"dynflow: the platform is not installed: there is no {error.name!r}. The library alone has no commands. "
            f"Install the platform with: pip install 'dynflow[platform]=={version}'"
        )
    cli.main()
