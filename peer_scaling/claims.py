"""Who trains a run: a claim in the run's folder, taken atomically and renewed while the run lives.

`claim-<token>.json` is made with link(2), which succeeds for one of all that want the same name, on
NFS too; the highest token holds the run, and tokens only grow. The file's mtime is the heartbeat.
Ages are differences of mtimes that the same file system gave, so clocks of machines do not matter.
A claim ends by release (mtime 0), by the death of its process where that can be seen, or when its
lease runs out: the next one to ask then takes the next token. Whoever lost the run finds out before
the next step, and has no way to publish (publish.py).
"""

import json
import os
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, final

from peer_scaling.durable import remove_temporaries, temporary_of
from peer_scaling.errors import check
from peer_scaling.faultpoints import fault_point
from peer_scaling.stop import LostRunError

CLAIM = re.compile(r"claim-(\d{6})\.json")
RENEWALS = 4
"""Per lease: three may fail before anybody may take the run."""
RELEASED = 0
"""mtime of a claim whose holder has ended."""


@dataclass(frozen=True)
class ClaimConfig:
    """How long a run belongs to a process that gives no sign of life."""

    lease_seconds: float = 120.0
    """After that long without a heartbeat anybody may continue the run. Above the time for which
    NFS clients believe what they last saw (acregmax, acdirmax: 60 s)."""
    hang_seconds: float = 600.0
    """Without a step, or a batch of an evaluation, for so long a run counts as hung: its heartbeat
    stops."""

    def __post_init__(self) -> None:
        names = ("lease_seconds", "hang_seconds")
        check(
            [f"{n}={getattr(self, n)} must be positive" for n in names if not getattr(self, n) > 0]
        )


@dataclass(frozen=True)
class Holder:
    """The newest claim of a run, as another process sees it."""

    token: int
    host: str
    pid: int
    machine: str
    """Name of the set of processes that `pid` is one of; empty where that cannot be told."""
    born: str
    """Start of the process, by the machine's own count: a number is soon another process's."""
    lease_seconds: float
    age: float = 0.0
    """Seconds since its last heartbeat."""
    released: bool = False
    """Whether its holder has left the run."""

    def __post_init__(self) -> None:
        texts = all(isinstance(text, str) for text in (self.host, self.machine, self.born))
        if not (texts and type(self.pid) is int and isinstance(self.lease_seconds, int | float)):
            raise TypeError("not what a claim holds")

    @property
    def is_held(self) -> bool:
        """Whether its holder neither left the run nor is seen to be gone."""
        return not (self.released or self._is_gone())

    @property
    def is_live(self) -> bool:
        """Whether the run is its holder's."""
        return self.is_held and not self.is_silent

    @property
    def is_silent(self) -> bool:
        """Whether it has given no sign of life for a lease, as one of a hung process."""
        return not self.released and self.age >= self.lease_seconds

    def _is_gone(self) -> bool:
        return bool(self.machine) and self.machine == _machine() and _born(self.pid) != self.born

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, last heartbeat {max(self.age, 0):.0f} s ago"


class HeldError(Exception):
    """The run is somebody else's, whom the message names."""


def find_holder(folder: Path, now: float | None = None) -> Holder | None:
    """The newest claim in a run's folder; None if there is none.

    Args:
        folder: of the run.
        now: mtime of something just written beside it; by default this machine's clock, which is
            good enough for showing.
    """
    now = time.time() if now is None else now
    for token in sorted(_tokens(folder), reverse=True):
        path = _path(folder, token)
        try:
            # Opened first: that is what makes an NFS client ask the server.
            with open(path, "rb", opener=_open_file) as file:
                mtime = os.fstat(file.fileno()).st_mtime
                values = json.loads(file.read())
            known = {"token": token, "age": now - mtime, "released": mtime == RELEASED}
            return Holder(**{**values, **known})
        except FileNotFoundError:  # taken over just now, and the next token was not listed yet
            continue
        except (OSError, ValueError, TypeError):
            # Alien or damaged: it holds for a default lease, and then the run can be had.
            lease = ClaimConfig().lease_seconds
            return Holder(token, "unknown", 0, "", "", lease, now - _mtime(path))
    return None


def claim(folder: Path, config: ClaimConfig) -> "Claim":
    """Take a run, whose folder is made if there is none.

    Raises:
        HeldError: somebody else has it.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = temporary_of(folder / "claim")
    own = Holder(
        0, socket.gethostname(), os.getpid(), _machine(), _born(os.getpid()), config.lease_seconds
    )
    values = {k: v for k, v in asdict(own).items() if k not in ("token", "age", "released")}
    try:
        probe.write_text(json.dumps(values))
        while True:
            holder = find_holder(folder, probe.stat().st_mtime)
            if holder and holder.is_live:
                raise HeldError(str(holder))
            token = holder.token + 1 if holder else 1
            with suppress(FileExistsError):  # another one was first: look again
                fault_point("claim.link")
                os.link(probe, _path(folder, token))
                break
            os.utime(probe)
    finally:
        probe.unlink(missing_ok=True)
    return Claim(folder, token, config)


@final
class Claim:
    """A run that is this process's, until `release` or until it is lost. A thread renews it."""

    def __init__(self, folder: Path, token: int, config: ClaimConfig) -> None:
        self.token = token
        self._folder, self._path, self._config = folder, _path(folder, token), config
        self._lost: str | None = None
        self._sign = self._renewed = time.monotonic()
        self._ended = threading.Event()
        for older in (t for t in _tokens(folder) if t < token):
            # Whoever holds one sees that it is gone, even where a folder's listing is cached.
            _path(folder, older).unlink(missing_ok=True)
        remove_temporaries(folder)
        self._thread = threading.Thread(target=self._renew_often, daemon=True)
        self._thread.start()

    def lost(self) -> bool:
        """Called at every step: a sign of life, and the answer whether the run is still ours.

        Costs a look at the clock, unless the process was paused for as long as others wait.
        """
        now = time.monotonic()
        paused = now - self._renewed > self._config.lease_seconds * 0.75
        self._sign = now
        if paused and not self._lost:
            self._renew()
        return bool(self._lost)

    def check(self) -> None:
        """Look at the folder, not at the clock: before something that cannot be taken back.

        Raises:
            LostRunError: the run is somebody else's.
        """
        self._renew()
        if self._lost:
            raise LostRunError(self._lost)

    def release(self) -> None:
        """Leave the run to whoever asks next."""
        self._ended.set()
        self._thread.join()
        if not self._lost:
            with suppress(OSError):  # then the lease runs out
                os.utime(self._path, (RELEASED, RELEASED))

    def _renew_often(self) -> None:
        wait = min(self._config.lease_seconds / RENEWALS, self._config.hang_seconds / 2)
        while not self._ended.wait(wait):
            if time.monotonic() - self._sign < self._config.hang_seconds:
                self._renew()

    def _renew(self) -> None:
        began = time.monotonic()
        try:
            fault_point("claim.renew")
            with self._path.open("r+b") as file:
                os.utime(file.fileno())
            newest = max(_tokens(self._folder), default=self.token)
            problem = f"claim {newest} replaced {self.token}" if newest > self.token else None
        except FileNotFoundError:
            problem = f"claim {self.token} is gone"
        except OSError as error:
            if began - self._renewed < self._config.lease_seconds:
                return  # nobody may take the run yet; tried again soon
            problem = f"no heartbeat could be written ({error.strerror})"
        self._lost = self._lost or problem
        self._renewed = began


def _path(folder: Path, token: int) -> Path:
    return folder / f"claim-{token:06d}.json"


def _open_file(path: str, flags: int) -> int:
    """No link and, without waiting for somebody to write to it, no pipe: what is stored is data."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _tokens(folder: Path) -> list[int]:
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [int(match[1]) for name in names if (match := CLAIM.fullmatch(name))]


def _mtime(path: Path) -> float:
    with suppress(OSError):
        return path.lstat().st_mtime
    return 0.0


@cache
def _machine() -> str:
    """Names the set of processes that a process number is one of: boot and PID namespace."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    return ""


def _born(pid: int) -> str:
    """When a process of this machine started, in clock ticks; empty if it has ended."""
    if sys.platform != "linux":
        return ""
    try:
        # After the name, which may hold anything: state is the 3rd field, start time the 22nd.
        fields: list[Any] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if fields[0] in "ZX" else str(fields[19])
