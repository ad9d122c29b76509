"""Dies in a phase of an iteration, by SIGKILL: killing.py PHASE ITERATION SECONDS, then eepo-fast's own."""

import os
import signal
import sys
import threading

from eepo_fast import cli
from eepo_fast.run import watchdog


def die_in_phase(phase, iteration, seconds):
    """So many seconds after the phase of that iteration, or the next one that has it, has begun."""
    enter = watchdog.Watchdog.enter

    def entering(self, name):
        enter(self, name)
        found, _, number = name.rpartition(" iteration ")
        if found.startswith(f"{phase} ") and int(number) >= iteration:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    watchdog.Watchdog.enter = entering


if __name__ == "__main__":
    die_in_phase(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    sys.exit(cli.main(sys.argv[4:]))
