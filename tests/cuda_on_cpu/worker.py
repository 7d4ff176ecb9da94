"""Calls the operators of one library as read from its standard input, until that ends: see fake_gpu_kernels.py.

A fault in a kernel ends the process, with the report of what found the fault on its standard error.
"""

import ctypes
import pickle
import sys

import torch


def serve(library: str) -> None:
    torch.ops.load_library(library)
    shuffle_threads = ctypes.CDLL(library).shuffle_threads
    while True:
        try:
            name, arguments, order, deterministic = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        shuffle_threads(order)
        torch.use_deterministic_algorithms(deterministic)
        try:
            result = getattr(torch.ops.solq_lab, name)(*arguments)
        except (ValueError, RuntimeError) as error:
            result = error
        pickle.dump(result, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
