"""The allocator setting that the command makes, seen from within a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator on Linux")

# Whether the heap is advised to lie in huge pages: "hg" among the flags of a mapping of a gigabyte or more, before and
# after memory was given back; what is kept of 512 MB that were freed, before and after, in MB.
CHILD = """
import ctypes, sys
from mesh_transformer import compat
def advised():
    size, found = 0, False
    for line in open("/proc/self/smaps"):
        if line.startswith("Size:"):
            size = int(line.split()[1])
        found = found or (line.startswith("VmFlags:") and size > 1 << 20 and " hg" in line)
    return found
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4 // 1024
compat.prepare_process()
print(advised())
empty = resident()
held = ctypes.create_string_buffer(512 << 20)
ctypes.memset(held, 1, 512 << 20)
del held
print(resident() - empty)
compat.give_memory_back()
print(resident() - empty)
print(advised())
"""


def run(**environment: str) -> list[str]:
    """The child's four answers."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=os.environ | environment, check=True, capture_output=True, text=True
    )
    return done.stdout.split()


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="a system without huge pages"
)
def test_the_heap_keeps_its_memory_in_huge_pages() -> None:
    advised, kept, left, again = run(MESH_TRANSFORMER_ALLOCATOR="")
    assert (advised, again) == ("True", "True")
    assert int(kept) >= 500
    assert int(left) < 100


def test_it_can_be_turned_off() -> None:
    advised, kept, _, _ = run(MESH_TRANSFORMER_ALLOCATOR="default")
    assert advised == "False"
    assert int(kept) < 100
