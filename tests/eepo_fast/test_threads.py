"""How torch's threads wait: said before torch is loaded, where the user has not."""

import os
import subprocess
import sys

import pytest

CODE = "import sys, os, eepo_fast; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("user", "found"),
    [
        ({}, "False 300"),
        ({"GOMP_SPINCOUNT": "7"}, "False 7"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "False None"),
    ],
)
def test_threads_spin_briefly_unless_the_user_has_said(user, found):
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | user
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == found, done.stderr
