"""How long tests wait: until something is so, or so long that no machine is that slow."""

import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

# Seconds, on a busy machine too. Below the 600 s after which a collective gives up by itself.
PATIENCE = 500.0

FoundT = TypeVar("FoundT")


def wait_for(
    condition: Callable[[], FoundT], *, of: subprocess.Popen[bytes] | None = None
) -> FoundT:
    """Return what `condition` returns once that is true.

    Raises:
        TimeoutError: it never was.
        AssertionError: the process that it waits for (`of`) has ended before.
    """
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert of is None or of.poll() is None, f"{of.args} ended with {of.returncode}"
        if time.monotonic() > deadline:
            raise TimeoutError(f"{condition} was not so in {PATIENCE:.0f} s")
        time.sleep(0.05)
    return found
