"""torchrun for a run: `python -m solq_lab.training.torchrun [OPTIONS OF TORCHRUN] RUN_FOLDER`, once on every machine.

It adds to torchrun, under which a training works as well: a rendezvous on the first machine of a SLURM step, else on a
free port; after a stop signal, SIGUSR1 too, time to save, and status 0 where the training has saved.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from solq_lab.errors import ExplainedError, UserError
from solq_lab.heartbeat import SECONDS_TO_SAVE
from solq_lab.runs import RunError, load_run

log = logging.getLogger("solq_lab.training")

RENDEZVOUS_OPTIONS = ("--standalone", "--nnodes", "--rdzv", "--master", "--node")
MIN_PORT, PORTS = 20_000, 10_000  # below those that systems give to connections; two jobs rarely get the same


def main(arguments: list[str]) -> int:
    """Start the processes of a training and wait for them.

    Returns:
        The exit status: 0 finished, or stopped by a signal after saving; 2 there is no such run; 1 anything else.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    if not arguments:
        log.error("usage: python -m solq_lab.training.torchrun [OPTIONS OF TORCHRUN] RUN_FOLDER")
        return UserError.exit_status
    *options, folder = arguments
    try:
        run = load_run(folder)
    except RunError as error:
        log.error("%s", error)
        return error.exit_status

    # Read by torchrun as it is imported; a torch that does not know them has its own values.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(int(SECONDS_TO_SAVE)))
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGUSR1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's value too, without its banner
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        torchrun.main([*rendezvous_options(options, os.environ), *options, "-m", "solq_lab.training", folder])
    except SignalException as stopped:
        state = run.status()["state"]
        log.warning("%s: the processes have ended, the run is %s", stopped, state)
        return 0 if state in ("preempted", "finished") else ExplainedError.exit_status
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        how = failure.signal_name() if failure.exitcode < 0 else f"exit status {failure.exitcode}"
        log.error("rank %d, process %d, ended first, with %s", rank, failure.pid, how)
        return UserError.exit_status if failure.exitcode == UserError.exit_status else ExplainedError.exit_status
    return 0


def rendezvous_options(options: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The rendezvous options for torchrun, from SLURM's variables; none where `options` have one already."""
    if any(option.replace("_", "-").startswith(RENDEZVOUS_OPTIONS) for option in options):
        return []
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    if nodes == 1:
        return ["--standalone"]

    expand = ["scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]]
    first, *_ = subprocess.run(expand, capture_output=True, text=True, check=True).stdout.split()
    job, restart = environment["SLURM_JOB_ID"], environment.get("SLURM_RESTART_COUNT", "0")
    endpoint = f"{first}:{MIN_PORT + int(job) % PORTS}"
    return [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-id={job}.{restart}", f"--rdzv-endpoint={endpoint}"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
