"""Processes that tests start."""

import os
import socket
import sys

import torch.multiprocessing


def start(function, folder, count):
    """Calls function(rank, port, folder) in so many processes, which may meet at the port; raises what one of them
    raises.

    One fresh process imports the test's modules, which takes seconds, and is forked before it has threads.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        arguments = (free.getsockname()[1], folder)
    torch.multiprocessing.start_processes(_fork, (function, arguments, count), nprocs=1, start_method="spawn")


def _fork(_, function, arguments, count):
    torch.multiprocessing.start_processes(_call, (function, arguments), nprocs=count, start_method="fork")


def _call(rank, function, arguments):
    function(rank, *arguments)
    # Python's shutdown is left out. A thread of torch's that then wants to give a Python object back is ended in the
    # midst of C++, and the process with it, by SIGABRT: one of some thirty processes with gloo on a busy machine, with
    # or without this package.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
