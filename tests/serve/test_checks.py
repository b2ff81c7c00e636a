from __future__ import annotations

import socket
from pathlib import Path

import pytest

from guard.serve import checks
from guard.serve.checks import CheckError

GIB = 1 << 30


@pytest.mark.parametrize("version", [(3, 10), (3, 15), (2, 7)])
def test_an_unsupported_python_is_named(version: tuple[int, int]) -> None:
    with pytest.raises(CheckError, match=rf"3\.11 to 3\.14 and this is {version[0]}\.{version[1]}"):
        checks.check_python(version)


@pytest.mark.parametrize("version", [(3, 11), (3, 14)])
def test_the_ends_of_the_supported_range_pass(version: tuple[int, int]) -> None:
    checks.check_python(version)


def test_a_processor_without_avx2_is_refused() -> None:
    with pytest.raises(CheckError, match="AVX2"):
        checks.check_cpu("x86_64", {"sse4_2", "avx"})
    checks.check_cpu("x86_64", {"avx", "avx2"})


def test_arm_needs_no_avx2_and_an_untold_processor_is_not_refused() -> None:
    checks.check_cpu("aarch64", {"asimd"})
    checks.check_cpu("x86_64", set())


def test_the_flags_are_those_of_cpuinfo(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nflags\t\t: fpu\n"
    )
    assert checks.cpu_flags(tmp_path / "cpuinfo") == {"fpu", "avx2"}
    assert checks.cpu_flags(tmp_path / "absent") == set()


@pytest.mark.parametrize(
    ("system", "machine"), [("darwin", "arm64"), ("win32", "AMD64"), ("linux", "riscv64")]
)
def test_a_system_without_a_cpu_build_is_refused(system: str, machine: str) -> None:
    with pytest.raises(CheckError, match="Linux with an x86-64 or aarch64"):
        checks.check_platform(system, machine)


def test_too_little_memory_says_how_much() -> None:
    with pytest.raises(CheckError, match=r"4\.0 GiB of free memory are needed and 1\.0 GiB are available"):
        checks.check_memory(4 * GIB, GIB)
    checks.check_memory(4 * GIB, 4 * GIB)


def test_a_container_limit_counts_and_its_page_cache_does_not(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {16 * GIB // 1024} kB\n")
    assert checks.available_memory(tmp_path, tmp_path) == 16 * GIB
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {GIB}\n")
    assert checks.available_memory(tmp_path, tmp_path) == 2 * GIB
    (tmp_path / "memory.max").write_text("max\n")
    assert checks.available_memory(tmp_path, tmp_path) == 16 * GIB


def test_unknown_memory_is_no_reason_to_refuse(tmp_path: Path) -> None:
    assert checks.available_memory(tmp_path, tmp_path) is None


def test_too_little_disk_says_how_much(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match=r"6\.0 GiB of free disk .* 2\.0 GiB are there"):
        checks.check_disk(tmp_path, 6 * GIB, 2 * GIB)


def test_a_busy_port_is_refused_and_a_free_one_is_not() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            CheckError, match=f"port {port} on 127.0.0.1 is in use: choose another with PORT="
        ):
            checks.check_port("127.0.0.1", port)
    checks.check_port("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(CheckError, match="HOST="):
        checks.check_port("192.0.2.1", 8080)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_other_machines_need_keys(host: str) -> None:
    with pytest.raises(CheckError, match="without API keys"):
        checks.check_exposure(host, has_keys=False)
    checks.check_exposure(host, has_keys=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    checks.check_exposure(host, has_keys=False)
