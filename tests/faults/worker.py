"""A rank that misbehaves, for torchrun: worker.py KIND ITERATION FOLDER, then eepo-fast's own. FOLDER/done: when it
did."""

import os
import signal
import sys
import time
from pathlib import Path

from patience import watch_from

from eepo_fast import cli
from eepo_fast.algorithm import iteration, trainer

KIND, ITERATION, FOLDER = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
RANK = int(os.environ.get("RANK", "0"))


def once():
    if (FOLDER / "done").exists():
        return False
    (FOLDER / "done").write_text(str(time.time()))
    return True


def misbehaving(owner, original, where):
    def call(self, *args, **kwargs):
        if RANK == 1 and getattr(self, "setup", self).state.step == ITERATION - 1 and once():
            if KIND.startswith("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            if KIND.startswith("stop"):
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(3600)
        return original(self, *args, **kwargs)

    if KIND.endswith(where):
        setattr(owner, original.__name__, call)


watch_from(ITERATION)
misbehaving(iteration.Iteration, iteration.Iteration.generate, "rollout")
misbehaving(trainer.Trainer, trainer.Trainer._grade, "reward")
misbehaving(trainer.Trainer, trainer.Trainer._update, "update")
if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[4:]))
