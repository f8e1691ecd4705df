"""`python -m holdoff_coordinator`."""

from holdoff_coordinator.cli import main

main()
