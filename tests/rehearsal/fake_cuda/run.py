"""python run.py LIBRARY REQUESTS: plays scenes in a process that has the fake device, and prints what they found.

REQUESTS: a JSON list of [name, scene, its arguments, fault or null]. An error is a finding, too: its type and words.
"""

import ctypes
import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1])  # before torch

    import device

    sys.path.append(str(device.SOURCE.parents[3] / "bench"))
    sys.modules["trl_peer"] = SimpleNamespace(TRL=None)
    import scenes
    from faults import FAULTS

    device.attach()
    found = {}
    for name, scene, arguments, fault in json.loads(sys.argv[2]):
        with FAULTS[fault]() if fault else nullcontext():
            try:
                found[name] = scenes.SCENES[scene](**arguments)
            except Exception as error:
                if not fault:
                    raise
                found[name] = {"error": f"{type(error).__name__}: {error}"}
    print("FOUND " + json.dumps(found))
