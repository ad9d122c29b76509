"""python run.py LIBRARY REQUESTS: plays scenes in processes that have the fake device, and prints what they found.

REQUESTS: a JSON list of [name, scene, its arguments, fault or null]. Each has a process of its own, forked from one
that has imported what they need, so that no fault outlives its scene. An error of a fault is a finding: type and words.
"""

import ctypes
import faulthandler
import json
import os
import sys
import traceback
from contextlib import nullcontext
from types import SimpleNamespace


def played(scene, arguments: dict, fault) -> dict:
    with fault() if fault else nullcontext():
        try:
            return scene(**arguments)
        except Exception as error:
            if not fault:
                raise
            return {"error": f"{type(error).__name__}: {error}"}


def in_a_process_of_its_own(*request) -> dict:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writer, json.dumps(played(*request)).encode())  # a pipe holds 64 KiB; they are a few
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)  # what PyTorch takes down at a process's end does not know this device
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"exit {os.waitstatus_to_exitcode(status)}"
    return json.loads(text)


if __name__ == "__main__":
    faulthandler.enable()
    ctypes.CDLL(sys.argv[1])  # before torch

    import device

    sys.path.append(str(device.SOURCE.parents[3] / "bench"))
    sys.modules["trl_peer"] = SimpleNamespace(TRL=None)
    import scenes
    from faults import FAULTS

    requests = json.loads(sys.argv[2])
    if any(arguments.get("engine") == "deepspeed" for _, _, arguments, _ in requests):
        device.prepare_deepspeed()
    device.attach()
    found = {}
    for name, scene, arguments, fault in requests:
        try:
            found[name] = in_a_process_of_its_own(scenes.SCENES[scene], arguments, fault and FAULTS[fault])
        except AssertionError as error:
            sys.exit(f"{name}: {error}")
    print("FOUND " + json.dumps(found), flush=True)
    os._exit(0)
