"""Run pip quietly: one line a step with its time, everything pip said in a log, its end shown on failure."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

# A configured but absent location of wheels is worth a line in the log and none on the screen.
_NOISE = ("WARNING: Location ", "WARNING: Url ", "WARNING: Running pip as", "[notice]")
_NEWS = ("Collecting ", "Downloading ", "Installing ", "Building ", "Preparing ")
_SECONDS_BETWEEN_LINES = 30.0


class SetupError(RuntimeError):
    """The environment cannot be made; the message is one sentence for the person who asked."""


def say(text: str) -> None:
    """One line of progress."""
    print(text, flush=True)


class Pip:
    """The pip of one virtual environment."""

    def __init__(self, python: Path, log: Path) -> None:
        self._python = python
        self._log = log

    def install(self, what: str, *arguments: str) -> None:
        """Install, or raise SetupError after showing the end of what pip said."""
        code, lines = self._run(what, "install", *arguments)
        if code != 0:
            shown = [line for line in lines if line.strip() and not line.lstrip().startswith(_NOISE)]
            print("\n".join(shown[-15:]), file=sys.stderr)
            raise SetupError(f"installing {what} failed; all that pip said is in {self._log}.")

    def attempt(self, what: str, *arguments: str) -> bool:
        """Install if pip's own configuration offers it, and say whether it did.

        Raises SetupError for any failure other than "no such version".
        """
        code, lines = self._run(what, "install", *arguments)
        if code == 0:
            return True
        if any("No matching distribution" in line for line in lines):
            return False
        print("\n".join(lines[-15:]), file=sys.stderr)
        raise SetupError(f"installing {what} failed; all that pip said is in {self._log}.")

    def download(self, what: str, requirement: str, folder: Path) -> bool:
        """Fetch one wheel without what it requires, and say whether the index has it."""
        code, _ = self._run(what, "download", "--no-deps", "--dest", str(folder), requirement)
        return code == 0

    def uninstall(self, *names: str) -> None:
        """Remove packages."""
        self._run(f"removing {', '.join(names)}", "uninstall", "--yes", *names)

    def requires(self, name: str) -> list[str]:
        """The requirement lines in an installed package's metadata."""
        code = f"import importlib.metadata as m; print(*(m.requires({name!r}) or ()), sep='\\n')"
        return [line for line in self.python("-c", code).splitlines() if line]

    def python(self, *arguments: str) -> str:
        """Run the environment's interpreter and return what it printed."""
        done = subprocess.run([str(self._python), *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SetupError(f"the environment's Python does not work: {done.stderr.strip()}")
        return done.stdout

    def _run(self, what: str, verb: str, *arguments: str) -> tuple[int, list[str]]:
        options = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
        if verb == "uninstall":
            options = options[:2]
        command = [str(self._python), "-m", "pip", verb, *options, *arguments]
        started = reported = time.monotonic()
        live = sys.stdout.isatty()
        lines: list[str] = []
        with (
            self._log.open("a", encoding="utf-8") as log,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
            ) as pip,
        ):
            log.write(f"$ {' '.join(command)}\n")
            assert pip.stdout is not None
            for line in pip.stdout:
                log.write(line)
                lines.append(line.rstrip())
                if not line.lstrip().startswith(_NEWS):
                    continue
                now = time.monotonic()
                news = line.strip().partition(" (")[0][:60]
                if live:
                    print(f"\r\033[K  {what}: {now - started:.0f} s, {news}", end="", flush=True)
                elif now - reported > _SECONDS_BETWEEN_LINES:
                    reported = now
                    say(f"  {what}: {now - started:.0f} s, {news}")
            code = pip.wait()
        if live:
            print("\r\033[K", end="", flush=True)
        if code == 0:
            say(f"  {what}: {time.monotonic() - started:.0f} s")
        return code, lines
