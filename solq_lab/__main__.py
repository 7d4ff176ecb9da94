"""The command line as `python -m solq_lab`, for callers that know only the interpreter."""

from solq_lab.workbench.cli import main

main()
