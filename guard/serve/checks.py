"""What a machine must offer before anything is started; each failure is one sentence that says what to do.

Only the standard library is used: the set-up script runs these before the environment exists.
"""

from __future__ import annotations

import errno
import ipaddress
import platform
import shutil
import socket
import sys
from collections.abc import Collection
from pathlib import Path

PYTHONS = ((3, 11), (3, 14))
"""Oldest and newest Python that vLLM's CPU build supports."""
MEMORY_NEEDED = 4 << 30
"""Bytes of free memory asked for: what engine and gateway hold with the lab model, with room to spare."""

_ARM = ("aarch64", "arm64")
_X86 = ("x86_64", "amd64")


class CheckError(RuntimeError):
    """The machine cannot serve; the message is one sentence."""


def check_python(version: tuple[int, int] = (sys.version_info[0], sys.version_info[1])) -> None:
    """Raise CheckError unless vLLM's CPU build supports this Python."""
    oldest, newest = PYTHONS
    if not oldest <= version <= newest:
        raise CheckError(
            f"neuronguard needs Python {oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]} "
            f"and this is {version[0]}.{version[1]}: name another with `make PYTHON=/path/to/python3.12 …`."
        )


def check_platform(system: str = sys.platform, machine: str | None = None) -> None:
    """Raise CheckError unless vLLM publishes a CPU build for this system."""
    machine = (machine or platform.machine()).lower()
    if system != "linux" or machine not in _ARM + _X86:
        raise CheckError(
            f"vLLM's CPU build runs on Linux with an x86-64 or aarch64 processor and this is {system} "
            f"on {machine}: use such a machine or a container on one."
        )


def check_cpu(machine: str | None = None, flags: Collection[str] | None = None) -> None:
    """Raise CheckError unless the processor has the vector instructions that vLLM's kernels are built for.

    Without AVX2 vLLM loads no kernels at all and fails later and less clearly (``platforms/cpu.py``).
    """
    if (machine or platform.machine()).lower() not in _X86:
        return
    flags = cpu_flags() if flags is None else flags
    # An empty set means that the system does not tell, which is no reason to refuse.
    if flags and "avx2" not in flags:
        raise CheckError("vLLM's CPU build needs a processor with AVX2, which this one does not have.")


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The first processor's feature flags; empty where the system does not list them."""
    try:
        lines = cpuinfo.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    line = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def check_memory(needed: int = MEMORY_NEEDED, available: int | None = None) -> None:
    """Raise CheckError unless ``needed`` bytes can be had without swapping."""
    available = available_memory() if available is None else available
    if available is not None and available < needed:
        raise CheckError(
            f"{_gib(needed)} of free memory are needed and {_gib(available)} are available: "
            "stop something else or use a larger machine."
        )


def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that can be allocated now, within the container's limit where there is one; None if unknown."""
    found: list[int] = []
    try:
        for line in (proc / "meminfo").read_text("utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            ceiling = (cgroup / limit).read_text("utf-8").strip()
            taken = int((cgroup / used).read_text("utf-8"))
        except OSError:
            continue
        if ceiling != "max":
            # Page cache counts as used here though it can be reclaimed; it is added back.
            found.append(int(ceiling) - taken + _reclaimable(cgroup / Path(limit).parent / "memory.stat"))
    return min(found, default=None)


def _reclaimable(stat: Path) -> int:
    try:
        lines = stat.read_text("utf-8").splitlines()
    except OSError:
        return 0
    values = dict(line.split()[:2] for line in lines if len(line.split()) == 2)
    return int(values.get("inactive_file", values.get("total_inactive_file", "0")))


def check_disk(folder: Path, needed: int, free: int | None = None) -> None:
    """Raise CheckError unless the disk that holds ``folder`` has ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free if free is None else free
    if free < needed:
        raise CheckError(f"{_gib(needed)} of free disk are needed under {folder} and {_gib(free)} are there.")


def check_port(host: str, port: int) -> None:
    """Raise CheckError unless this process could listen on ``host``:``port`` now."""
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, OverflowError) as error:
        raise CheckError(f"{host}:{port} is not an address to listen on: {error}.") from error
    with socket.socket(address[0], address[1]) as probe:
        # As servers do, or a port that a stopped server left in TIME_WAIT would look busy.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address[4])
        except OSError as error:
            reason = {
                errno.EADDRINUSE: f"port {port} on {host} is in use: choose another with PORT=…",
                errno.EACCES: f"port {port} on {host} needs more rights: choose one above 1023 with PORT=…",
                errno.EADDRNOTAVAIL: f"{host} is not an address of this machine: choose another with HOST=…",
            }.get(error.errno or 0, f"cannot listen on {host}:{port}: {error}")
            raise CheckError(f"{reason}.") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, has_keys: bool) -> None:
    """Raise CheckError when an endpoint without API keys would be open to other machines."""
    if not is_loopback(host) and not has_keys:
        raise CheckError(
            f"listening on {host} would open the endpoint to other machines without API keys: "
            "name a policy file that has `keys:`, or listen on 127.0.0.1."
        )


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
