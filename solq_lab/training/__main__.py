"""Train a run: `python -m solq_lab.training RUN_FOLDER`, or the same under torchrun for several processes."""

import os
import sys

if __name__ == "__main__":
    # Waiting OpenMP threads sleep instead of spinning: on a CPU that others use too, spinning makes a step several
    # times slower. OpenMP reads this once, when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from solq_lab.training.command import main

    sys.exit(main(sys.argv[1:]))
