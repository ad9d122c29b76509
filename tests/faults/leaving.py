"""Two forked ranks leave `eepo-fast train` in every way there is: leaving.py FOLDER. Prints, as JSON, each rank's exit
code and whether its process group was closed before its interpreter ended, by way."""

import atexit
import gc
import json
import os
import sys
from functools import partial
from pathlib import Path

import torch.distributed as dist

from eepo_fast import cli, distributed
from eepo_fast.run import build
from eepo_fast.types import Interrupted, UserError

CONFIG = Path(__file__).parents[2] / "configs/demo.yaml"
WAYS = {  # what rank 1 raises, and rank 0, which else waits for it
    "it ends": (None, None),
    "a user's error on all ranks": (UserError("no such file", shared=True), UserError("no such file", shared=True)),
    "a user's error on one rank": (UserError("no such file"), None),
    "an exception": (RuntimeError("a bug"), None),
    "an interrupt": (KeyboardInterrupt(), None),
    "a signal": (Interrupted("SIGTERM"), Interrupted("SIGTERM")),
    "sys.exit in a user's function": (SystemExit(3), None),
    "a world that closes nothing": (None, None),
    "an interpreter that ends by itself": (None, None),
}


class Held:
    """What is at work when the interpreter ends, as a thread of gloo's now and then."""

    def __del__(self, abort=os.abort):  # the module's names are gone by then
        abort()


def leave(errors, config, *, resume, world):
    world.gather("both are here")
    if error := errors[1 - world.rank]:
        raise error
    world.gather("and both go on")
    return config.run_dir


def note(path):
    path.write_text(json.dumps(not dist.is_initialized()))


def be(rank, way, folder):
    """This process's life as a rank; does not return."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    meeting = f"file://{folder}/{list(WAYS).index(way)}"  # no port that another test may take
    dist.init_process_group = partial(dist.init_process_group, init_method=meeting, rank=rank, world_size=2)
    build.train = partial(leave, WAYS[way])
    if way == "a world that closes nothing":
        distributed.close_groups = lambda **options: None
    if way == "an interpreter that ends by itself":
        cli.end_rank = lambda command: sys.exit(command())
    globals()["held"] = Held()
    atexit.register(note, folder / f"{way} {rank}")
    sys.exit(cli.main(["train", str(CONFIG)]))


def main():
    folder = Path(sys.argv[1])
    gc.freeze()  # a rank's end is of what it has made, not of all that is imported: seconds less
    found = {}
    for way in WAYS:
        pids = []
        for rank in range(2):
            pids.append(os.fork())
            if pids[-1] == 0:
                be(rank, way, folder)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        found[way] = [(code, json.loads((folder / f"{way} {rank}").read_text())) for rank, code in enumerate(codes)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
