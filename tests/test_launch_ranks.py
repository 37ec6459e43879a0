"""The launch scripts with real ranks: one node; two nodes with an agent and one rank each, which share 127.0.0.1 or,
where this user may make network namespaces, have a network of their own each and a cable between them (veth).

The ranks of all runs but one are forked (support/launched.py), everything else is as users have it.

Every run distils the same tiny models on two data parallel ranks, so every run has to leave the same record, bit for
bit: that of `train_single_node.sh`, which is never stopped. In the run with restarts first a rank of one node is
killed, later a whole node (agent and rank), which is then started again with the same command line.

Not covered: several machines, NCCL, a cable that is cut.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.effort import FULL, LIMIT_S
from tests.support.launched import forked_ranks
from tests.support.runs import command_line, exported, metrics
from tests.support.trainers import write_pair, write_rows
from tests.test_launch import ROOT

pytestmark = pytest.mark.slow

STEPS, SAVE_STEPS = 24, 4
SINGLE, MULTI = "train_single_node.sh", "train_multi_node.sh"


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("launch")
    student, teacher = write_pair(root, "qwen3", layers=2)
    return command_line(
        model=student,
        teacher_model=teacher,
        dataset=write_rows(root / "rows.jsonl", 13),
        eval_dataset=write_rows(root / "held_out.jsonl", 3, seed=9),
        lmbda=0,
        global_batch_size=2,
        train_iters=STEPS,
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        eval_steps=8,
        lr=3e-3,
        report_to="none",
        device="cpu",
    )


@dataclass(frozen=True)
class Host:
    """What a node sees of the network."""

    address: str
    interface: str
    inside: tuple[str, ...] = ()  # the command that carries out another one there


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two of them: namespaces with a veth pair between them, else 127.0.0.1 for both."""
    names = [f"gkd{os.getpid()}{letter}" for letter in "ab"]
    both = tuple(Host(f"10.209.17.{i}", "gkd0", ("ip", "netns", "exec", name)) for i, name in enumerate(names, start=1))
    commands = [
        *(f"ip netns add {name}" for name in names),
        f"ip -n {names[0]} link add gkd0 type veth peer name gkd0 netns {names[1]}",
        *(f"ip -n {n} address add {host.address}/24 dev gkd0" for n, host in zip(names, both, strict=True)),
        *(f"ip -n {name} link set {device} up" for name in names for device in ("lo", "gkd0")),
    ]
    made = shutil.which("ip") is not None and all(
        subprocess.run(command.split(), capture_output=True).returncode == 0 for command in commands
    )
    print("two hosts:", "network namespaces" if made else "127.0.0.1 twice (namespaces cannot be made)")
    yield both if made else (Host("127.0.0.1", "lo"), Host("127.0.0.1", "lo"))  # type: ignore[misc]
    if shutil.which("ip") is not None:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@dataclass
class Nodes:
    """Scripts started by a test, in sessions of their own; what is left of them is ended with the test."""

    logs: Path
    flags: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, script: str, save: Path, *, host: Host | None = None, **env: str) -> subprocess.Popen[bytes]:
        job = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RDZV_ENDPOINT", "NNODES", "RANK", "WORLD_SIZE", "LOCAL_RANK")
        environment = {name: value for name, value in os.environ.items() if name not in job}
        environment |= {"GKD_VENV": sys.prefix, "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        environment |= self.environment | env
        command = ["bash", str(ROOT / "launch" / script), *self.flags, "--save", str(save)]
        if host is not None:
            environment |= {"GLOO_SOCKET_IFNAME": host.interface, "LOCAL_ADDR": host.address}
            command = [*host.inside, *command]
        with (self.logs / f"{len(self.started)}.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self.started.append(process)
        return process

    def log(self, process: subprocess.Popen[bytes]) -> str:
        return (self.logs / f"{self.started.index(process)}.log").read_text(errors="replace")

    def tails(self) -> str:
        return "\n".join(f"---- {n}\n{self.log(process)[-3000:]}" for n, process in enumerate(self.started))

    def wait(self, *processes: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + LIMIT_S
        for process in processes:
            try:
                status = process.wait(timeout=max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                status = -1
            assert status == 0, f"exit code {status} (-1: not ended in time)\n{self.tails()}"

    def until(self, what: Callable[[], bool]) -> None:
        end = time.monotonic() + LIMIT_S
        while not what():
            assert time.monotonic() < end, self.tails()
            time.sleep(0.01)

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                for pid in (process.pid, *workers(process)):
                    os.kill(pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def nodes(tmp_path: Path, flags: list[str]) -> Iterator[Nodes]:
    with forked_ranks() as environment:
        nodes = Nodes(tmp_path, flags, environment)
        yield nodes
        nodes.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, flags: list[str]) -> Path:
    """The run directory of `train_single_node.sh` on two ranks."""
    root = tmp_path_factory.mktemp("single")
    with forked_ranks() as environment:
        nodes = Nodes(root, flags, environment)
        try:
            nodes.wait(nodes.start(SINGLE, root / "run", NPROC_PER_NODE="2"))
        finally:
            nodes.close()
    return root / "run"


def workers(agent: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of an agent's ranks: its children that carry out the program."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"megatron_gkd" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def rows_written(run_dir: Path) -> int:
    record = run_dir / "metrics.jsonl"
    return record.read_bytes().count(b"\n") if record.exists() else 0


def assert_same_run(run_dir: Path, whole: Path) -> None:
    assert [row["step"] for row in metrics(run_dir)] == list(range(1, STEPS + 1))
    assert metrics(run_dir) == metrics(whole)
    evaluations = [metrics(run, first_step=0, file="evaluation.jsonl") for run in (run_dir, whole)]
    assert evaluations[0] == evaluations[1]
    assert [row["step"] for row in evaluations[0]] == [0, 8, 16, 24]
    ours, theirs = exported(run_dir), exported(whole)
    assert all(ours[name].equal(theirs[name]) for name in ours | theirs)


def test_single_node(whole: Path):
    assert [row["step"] for row in metrics(whole)] == list(range(1, STEPS + 1))
    assert (whole / "hf" / "config.json").is_file()
    assert len(list((whole / "checkpoints").glob("step_*"))) == 2


def test_an_interpreter_of_its_own(tmp_path: Path, flags: list[str]):
    """A rank as users have it; by night two."""
    words = list(flags)
    words[words.index("--train_iters") + 1] = "2"
    nodes = Nodes(tmp_path, words)
    try:
        nodes.wait(nodes.start(SINGLE, tmp_path / "run", NPROC_PER_NODE="2" if FULL else "1"))
    finally:
        nodes.close()
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run" / "hf" / "config.json").is_file()


@pytest.mark.skipif(not FULL, reason="by night: the run on two nodes loses a rank too")
def test_a_killed_rank_on_one_node(tmp_path: Path, nodes: Nodes, whole: Path):
    agent = nodes.start(SINGLE, tmp_path / "run", NPROC_PER_NODE="2", MAX_RESTARTS="1")
    nodes.until(lambda: rows_written(tmp_path / "run") > SAVE_STEPS + 1)
    os.kill(workers(agent)[1], signal.SIGKILL)
    nodes.wait(agent)
    assert_same_run(tmp_path / "run", whole)
    assert nodes.log(agent).count("resumed from") == 1, nodes.tails()


def test_two_nodes_by_number(tmp_path: Path, nodes: Nodes, whole: Path):
    env = dict(NNODES="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    nodes.wait(*[nodes.start(MULTI, tmp_path / "run", **env, NODE_RANK=str(rank)) for rank in (0, 1)])
    assert_same_run(tmp_path / "run", whole)


def test_a_killed_rank_and_a_killed_node(tmp_path: Path, hosts: tuple[Host, Host], nodes: Nodes, whole: Path):
    run_dir, port = tmp_path / "run", free_port()
    env = dict(
        NNODES="2",
        RDZV_ENDPOINT=f"{hosts[0].address}:{port}",
        MAX_RESTARTS="2",
        NPROC_PER_NODE="1",
    )
    own_networks = hosts[0] != hosts[1]  # else both have the endpoint's address, and are told who keeps it
    configurations = ["keep_alive_interval=1" + ("" if own_networks else f",is_host={i}") for i in (1, 0)]
    first = nodes.start(MULTI, run_dir, host=hosts[0], **env, RDZV_CONF=configurations[0])
    nodes.until(lambda: listening(first, port))  # this node keeps the rendezvous, the other one may be lost
    second = nodes.start(MULTI, run_dir, host=hosts[1], **env, RDZV_CONF=configurations[1])

    nodes.until(lambda: rows_written(run_dir) > SAVE_STEPS + 1)
    (rank,) = workers(second)
    os.kill(rank, signal.SIGKILL)
    killed_at = rows_written(run_dir)
    assert SAVE_STEPS < killed_at < STEPS / 2, "killed too late to see a restart"
    nodes.until(lambda: "resumed from" in nodes.log(first) + nodes.log(second))

    nodes.until(lambda: rows_written(run_dir) > STEPS / 2)
    (rank,) = workers(second)
    os.kill(second.pid, signal.SIGKILL)
    os.kill(rank, signal.SIGKILL)
    assert rows_written(run_dir) < STEPS
    second.wait()
    again = nodes.start(MULTI, run_dir, host=hosts[1], **env, RDZV_CONF=configurations[1])

    nodes.wait(first, again)
    assert_same_run(run_dir, whole)
    text = "".join(nodes.log(process) for process in nodes.started)
    assert text.count("resumed from") == 2, nodes.tails()


def listening(process: subprocess.Popen[bytes], port: int) -> bool:
    """Whether anybody listens on the port in the network of the process (Linux: state 0A of /proc/net/tcp)."""
    assert process.poll() is None, "it has ended"
    network = Path(f"/proc/{process.pid}/net")
    rows = [row.split() for name in ("tcp", "tcp6") for row in (network / name).read_text().splitlines()]
    return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)
