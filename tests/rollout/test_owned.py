"""Files that a worker opens for a pusher: no other is ever read. What a killed pusher leaves: it does not stay.

The attacks of a caller who may name anything, in this process; the worker's two methods that read files are called as
the server's endpoint calls them. Not covered: another user's process (the tests are one user).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_gkd.rollout import owned
from megatron_gkd.rollout.owned import open_private, owner, private_directory, remove_leftovers
from megatron_gkd.rollout.vllm import worker
from megatron_gkd.rollout.weight_transfer import SHM_PREFIX, ShmTransfer


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shared memory of its own, where the worker looks."""
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(worker, "open_private", lambda name: open_private(name, str(tmp_path / "shm")))
    return tmp_path / "shm"


@pytest.fixture
def pushed(root: Path) -> Path:
    directory = Path(private_directory(SHM_PREFIX, str(root)))
    (directory / "token").write_text("abc")
    (directory / "token").chmod(0o600)
    return directory


def read(name: object) -> str:
    return worker.RolloutWorker().gkd_read_token(name)  # type: ignore[arg-type]


def test_the_pushers_file_is_read(pushed: Path) -> None:
    assert read(f"{pushed.name}/token") == "abc"


def test_names_of_another_form_open_nothing(pushed: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "secret").chmod(0o600)
    for name in (
        *(str(pushed / "token"), str(tmp_path / "secret"), f"{pushed.name}/../../secret", "../secret", "/etc/hostname"),
        *(
            f"{pushed.name}/none",
            f"{pushed.name}/",
            f"{pushed.name}",
            f"./{pushed.name}/token",
            f"{pushed.name}/./token",
        ),
        *(f"{pushed.name}/token\0", f"{pushed.name}/token\n", "", "gkd-weights-x/token", None, 3, ["token"]),
    ):
        assert read(name) == "", name


@pytest.mark.parametrize("kind", ["link to a file", "link to a directory", "hard link", "open to others", "pipe"])
def test_a_name_that_leads_elsewhere_opens_nothing(pushed: Path, root: Path, tmp_path: Path, kind: str) -> None:
    """A link flipped behind a check was enough to read any file of the owner's."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o600)
    name = f"{pushed.name}/token"
    (pushed / "token").unlink()
    if kind == "link to a file":
        (pushed / "token").symlink_to(secret)
    elif kind == "hard link":
        os.link(secret, pushed / "token")
    elif kind == "pipe":
        os.mkfifo(pushed / "token", 0o600)
    else:
        (pushed / "token").write_text("secret")
        (pushed / "token").chmod(0o600)
        if kind == "open to others":
            pushed.chmod(0o755)
        else:
            other = f"{SHM_PREFIX}-{owner()}-00000000"
            (root / other).symlink_to(pushed)
            name = f"{other}/token"
    assert read(name) == ""
    with pytest.raises(OSError, match=r"not this user's alone|symbolic links|Not a directory"):
        open_private(name, str(root))


def test_a_bucket_is_read_by_its_name_alone(pushed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_file({"a": torch.arange(3.0)}, pushed / "bucket0.safetensors")
    (pushed / "bucket0.safetensors").chmod(0o600)
    found: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(worker.RolloutWorker, "gkd_bucket", lambda self, items, sums: found.update(items))
    taker = worker.RolloutWorker()
    taker.device = torch.device("cpu")
    taker.gkd_bucket_file(f"{pushed.name}/bucket0.safetensors", {"a": (0, 0)})
    assert torch.equal(found["a"], torch.arange(3.0))
    save_file({"b": torch.ones(1)}, tmp_path / "bucket1.safetensors")
    for name in (str(tmp_path / "bucket1.safetensors"), f"{pushed.name}/../../bucket1.safetensors"):
        with pytest.raises(PermissionError, match="not the name of a file of a pusher"):
            taker.gkd_bucket_file(name, {})
    assert found.keys() == {"a"}


def test_descriptors_are_closed(pushed: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    (pushed / "open").write_text("x")
    for name in ("token", "open", "none"):
        read(f"{pushed.name}/{name}")
    assert len(os.listdir("/proc/self/fd")) == before


# ---- leftovers -------------------------------------------------------------------------------------------------------

KILLED = """if True:
    import os, signal, sys
    from megatron_gkd.rollout.owned import private_directory
    path = private_directory("gkd-weights", sys.argv[1])
    open(path + "/bucket0.safetensors", "w").close()
    print(path, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_pusher_left_goes_with_the_next_push(root: Path, pushed: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", KILLED, str(root)], stdout=subprocess.PIPE, text=True, check=False)
    assert dead.returncode == -signal.SIGKILL
    left = Path(dead.stdout.strip())
    assert (left / "bucket0.safetensors").exists()
    way = ShmTransfer(lambda *_: None, root=str(root))  # type: ignore[arg-type, return-value]
    assert not left.exists()
    assert pushed.exists(), "its owner lives"
    way.close()


def test_only_dead_owners_of_this_place_and_prefix_lose_theirs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid, start, place = owner().split(".")
    of_dead = f"{SHM_PREFIX}-{pid}.{int(start) - 1}.{place}-00000000"  # the number was given again
    kept = (
        *(f"{SHM_PREFIX}-{owner()}-00000000", f"{SHM_PREFIX}-{pid}.1.0badf00d-00000000"),
        *(f"gkd-other-{pid}.1.{place}-00000000", f"{SHM_PREFIX}-abc", f"x{of_dead}", f"{of_dead}x"),
    )
    for name in (*kept, of_dead):
        (root / name).mkdir()
    remove_leftovers(SHM_PREFIX, str(root))
    assert sorted(os.listdir(root)) == sorted(kept)
    (root / of_dead).mkdir()
    monkeypatch.setattr(owned.os, "getuid", lambda: os.geteuid() + 1)
    remove_leftovers(SHM_PREFIX, str(root))
    assert (root / of_dead).exists(), "another user's"
    remove_leftovers(SHM_PREFIX, str(root / "nowhere"))
