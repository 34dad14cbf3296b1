"""A process forked from one that holds a Pipeline: what servers do that load before they fork their workers."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: the parent's sessions have threads, and the child's end must not wait for them, as they stayed behind
SCRIPT = """
import os, signal, sys, time
from lada_rt import Pipeline

pipe = Pipeline.load(n_threads=2, verify=False)
child = os.fork()
if child == 0:
    {child}
    sys.exit(7)
for _ in range(600):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        print(os.waitstatus_to_exitcode(status))
        break
    time.sleep(0.1)
else:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("hangs")
pipe = None  # the parent's own go as ever
"""


@pytest.mark.parametrize(
    "child",
    [
        "pass",
        "pipe = Pipeline.load(n_threads=2, verify=False)",
        "del pipe; import gc; gc.collect()",
        "grandchild = os.fork(); grandchild and os.waitpid(grandchild, 0)",
    ],
    ids=["ends", "loads anew", "drops it", "forks again"],
)
def test_a_child_ends_and_loads_its_own(child: str) -> None:
    command = [sys.executable, "-P", "-c", SCRIPT.format(child=child)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "7"), done.stderr
