"""The fused loss on two gloo ranks, measured round by round beside the methods of one process.

`FusedOnRanks` starts the ranks once, outside every measured time, and then asks all of them for the same thing at
the same time: a result, a timed call, or a peak. Each rank has one thread, half of both heads, and the same hidden
states as the parent (drawn from the same seed). Wall time of a call is the slowest rank's, between two barriers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.loss_methods import Case, Inputs, fused
from benchmarks.measure import Seconds, peak_bytes, timed

_CPU = torch.device("cpu")


class FusedOnRanks:
    """The ranks of one case; close() ends them."""

    def __init__(self, case: Case, world: int = 2) -> None:
        self.directory = tempfile.mkdtemp(prefix="bench-")
        context = torch.multiprocessing.get_context("forkserver")  # which imports once, and has computed nothing
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, self.directory, there, case), daemon=True)
            process.start()
            there.close()
            self.connections.append(here)
            self.processes.append(process)
        self._ask("ready")

    def _ask(self, what: str) -> list[Any]:
        for connection in self.connections:
            connection.send(what)
        return [connection.recv() for connection in self.connections]

    def time(self) -> Seconds:
        """Wall time of the slowest rank; CPU time of the busiest."""
        seconds = self._ask("time")
        return Seconds(max(wall for wall, _ in seconds), max(cpu for _, cpu in seconds))

    def peak(self) -> tuple[int, int]:
        """(peak bytes, of which the returned gradients) of the rank that needs most."""
        return max(self._ask("peak"))

    def result(self, probe_Hn: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
        """(loss, hidden gradient, head gradient times `probe_Hn`), put together from all ranks."""
        for connection in self.connections:
            connection.send(("result", probe_Hn.numpy()))
        parts = [connection.recv() for connection in self.connections]
        loss, hidden_grad, _ = parts[0]
        return loss, torch.from_numpy(hidden_grad), torch.cat([torch.from_numpy(head) for _, _, head in parts])

    def close(self) -> None:
        for connection, process in zip(self.connections, self.processes, strict=True):
            connection.close()  # a rank ends when its parent's end is gone
            process.join(30)
        shutil.rmtree(self.directory, ignore_errors=True)


def _serve(rank: int, world: int, directory: str, connection: Connection, case: Case) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world)
    inputs = Inputs.draw(case, dist.new_group(list(range(world))), _CPU)
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            break
        dist.barrier()
        if asked == "ready":
            connection.send(True)
        elif asked == "time":
            connection.send(tuple(timed(lambda: fused(inputs), _CPU)))
        elif asked == "peak":
            gradients = sum(x.nbytes for x in fused(inputs)[1:])
            connection.send((peak_bytes(lambda: fused(inputs), _CPU), gradients))
        else:
            loss, hidden_grad, head_grad = fused(inputs)
            projected = head_grad.float() @ torch.from_numpy(asked[1])
            connection.send((loss.item(), hidden_grad.float().numpy(), projected.numpy()))
    dist.destroy_process_group()
