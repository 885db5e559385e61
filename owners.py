"""Which process something belongs to, and whether that process is still there.

A process number alone does not tell: numbers are used again, in a container nearly always. What tells is the number
with the moment, in the kernel's own clock, at which its process began.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)  # what flock raises on file systems without it


@dataclass(frozen=True)
class Owner:
    host: str
    pid: int
    since: str  # ISO 8601, UTC
    command: str
    birth: str | None  # of the process, see birth_of; None where the system does not tell

    @classmethod
    def this_process(cls) -> Owner:
        program = Path(sys.argv[0]).name or "-"
        command = shlex.join(["python", program, *sys.argv[1:]])
        return cls(platform.node(), os.getpid(), utc(datetime.now(UTC)), command, birth_of(os.getpid()))

    @classmethod
    def of(cls, record: Any) -> Owner | None:
        """From its fields as JSON has them; None where it is something else."""
        if not isinstance(record, Mapping):
            return None
        values = {field.name: record.get(field.name) for field in dataclasses.fields(cls)}
        is_whole = isinstance(values["pid"], int) and values["pid"] > 0 and isinstance(values["host"], str)
        return cls(**values) if is_whole else None

    @property
    def is_here(self) -> bool:
        return self.host == platform.node()

    def is_alive(self) -> bool | None:
        """None: of another machine, which cannot be told from here."""
        if not self.is_here:
            return None
        return is_alive(self.pid) and (self.birth is None or birth_of(self.pid) in (None, self.birth))


def utc(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def is_alive(process: int) -> bool:
    if _stat(process)[:1] == ["Z"]:  # killed, and its parent has not asked yet
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def birth_of(process: int) -> str | None:
    """When the process began: which boot of this machine, and clock ticks since then. None where that is not told."""
    fields = _stat(process)
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}:{fields[19]}"
    except (OSError, IndexError):
        return None


def _stat(process: int) -> list[str]:
    """The fields of /proc/<process>/stat from the third on, its state; none where there is no such file."""
    try:
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
