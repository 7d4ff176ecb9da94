"""The command line as `python -m solq_lab`, for places that know an interpreter but not where scripts are installed."""

from solq_lab.workbench.cli import main

main()
