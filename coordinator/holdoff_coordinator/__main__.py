"""`holdoff-coordinator`, also as `python -m holdoff_coordinator`."""

import sys

from holdoff import _streams


def main() -> None:
    """Run the service's command line, if what it needs is installed."""
    _streams.prepare()
    try:
        from holdoff_coordinator import cli  # noqa: PLC0415 - what it needs may be missing

        cli.main()  # imports the rest once it knows which command
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("holdoff"):
            raise
        sys.exit(
            f"holdoff-coordinator: there is no Python module {error.name}; install all that it "
            "needs with: pip install 'holdoff[coordinator]'"
        )


if __name__ == "__main__":
    main()
