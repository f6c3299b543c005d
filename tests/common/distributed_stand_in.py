"""Stands in for helpers of the library's that its source distribution leaves out: several processes on the CPU."""

import multiprocessing
import os

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes


# processes fork from one that has imported everything: importing takes most of the time of these tests
multiprocessing.set_forkserver_preload(["tests.test_ultrafuser"])


def _get_distributed_device_type():
    return "cpu"


def _get_distributed_backend():
    return "gloo"


def _get_rank_device(rank):
    return torch.device("cpu")


def _set_rank_device(rank):
    pass


def _start_rank_processes(function, args, nprocs):
    start_processes(function, args=args, nprocs=nprocs, start_method="forkserver")


def run_distributed(world_size):
    """Calls a function in `world_size` processes of one group, with its rank before its own arguments."""

    def wrapped(function):
        def call(*args):
            store = dist.TCPStore("localhost", 0, world_size=None, is_master=True, wait_for_workers=False)
            _start_rank_processes(_in_group, (function, world_size, store.host, store.port, args), world_size)

        return call

    return wrapped


def _in_group(rank, function, world_size, host, port, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
    torch.set_num_threads(1)
    store = dist.TCPStore(host, port, world_size=None, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
