"""Freed memory is kept: a process that trains does not fetch its pages anew at every step."""

import ctypes
import subprocess
import sys

import pytest

from tests.harness import ROOT

COUNTS = """
import resource, torch
from benchmarks.memory import keep_freed_memory
from pof.network import create

torch.set_num_threads(1)
network = create("wrn_10_1", num_classes=10, in_chans=1, img_size=28)
images = torch.randn(96, 1, 28, 28)

def pages_fetched():
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        network(images).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = pages_fetched()
keep_freed_memory()
print(given_back, pages_fetched())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is no glibc")
def test_a_training_step_reuses_what_the_one_before_freed():
    command = [sys.executable, "-c", COUNTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept < given_back / 10
