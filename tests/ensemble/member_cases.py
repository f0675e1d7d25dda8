"""Two processes that hold parts of one ensemble."""

import socket

import torch


def part_of(t, rank):
    """The first two members, or the others, of (B, K, ...)."""
    return t[:, :2].contiguous() if rank == 0 else t[:, 2:].contiguous()


def _process(function, rank, port, tensors, results):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    results[rank] = function(*tensors, group=torch.distributed.group.WORLD, rank=rank)
    torch.distributed.destroy_process_group()


def in_two_ranks(function, tensors):
    """What `function(*tensors, group=, rank=)` gives on each of two gloo ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        workers = [
            context.Process(target=_process, args=(function, rank, port, tensors, results))
            for rank in range(2)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(240)  # each imports torch, on a machine that may be busy
        assert [worker.exitcode for worker in workers] == [0, 0]
        return results[0], results[1]
