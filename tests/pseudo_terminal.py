"""A real pseudo-terminal with the wizard in it, for tests that press its keys."""

import os
import select
import subprocess
import sys
import time
from pathlib import Path

from sidestep.config.places import PROJECT

ROWS, COLUMNS = 24, 80
SECONDS = 60.0  # A slow machine under load; the wizard itself takes less than one.

# Runs train.py as a user does, then says which heavy modules were imported on the way.
PROBE = """
import runpy, sys
sys.argv = ["train.py", *sys.argv[1:]]
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit as left:
    code = left.code
heavy = {"torch", "torchaudio", "transformers", "diffusers", "peft", "lycoris", "huggingface_hub"} & set(sys.modules)
print(f"code {code} heavy {sorted(heavy)}.")
"""


class Screen:
    """A pseudo-terminal of 80 x 24 with the wizard in it."""

    def __init__(self, *arguments: str, home: Path, **environment: str) -> None:
        import pty
        import termios

        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (ROWS, COLUMNS))
        known = {"PATH": "", "HOME": str(home), "XDG_CONFIG_HOME": str(home), "TERM": "xterm-256color"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROBE, *arguments],
            stdin=theirs, stdout=theirs, stderr=theirs, cwd=PROJECT, env={**known, **environment},
            start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""
        self._read_up_to = 0

    def wait_for(self, text: str, *, seconds: float = SECONDS) -> None:
        """Read on until a text appears behind the one that was waited for before."""
        end = time.monotonic() + seconds
        while (found := self.seen.find(text, self._read_up_to)) < 0:
            ready, _, _ = select.select([self._ours], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{text!r} did not appear after: {self.seen[-1500:]}"
            fresh = os.read(self._ours, 65_536).decode("utf-8", errors="replace")
            # prompt_toolkit asks where the cursor is; a terminal answers.
            for _ in range(fresh.count("\x1b[6n")):
                self.press("\x1b[1;1R")
            self.seen += fresh
        self._read_up_to = found + len(text)

    def press(self, keys: str) -> None:
        """Press keys."""
        os.write(self._ours, keys.encode())

    def close(self) -> None:
        """End whatever still runs."""
        self._process.kill()
        self._process.wait()
        os.close(self._ours)
