"""Where huge pages are asked for: only whole ones inside anonymous memory, and the content stays."""

from __future__ import annotations

import mmap
import subprocess
import sys

import numpy as np
import pytest

from engines import hugepages
from engines.hugepages import SIZE

MAPS = """\
00200000-00a00000 rw-p 00000000 00:00 0                                  [heap]
7f0000100000-7f0000700000 rw-p 00000000 00:00 0 
7f0001000000-7f0001300000 r--p 00000000 00:00 0 
7f0002000000-7f0002800000 rw-p 00000000 08:01 1234                       /usr/lib/a file.so
7f0003000000-7f0003800000 rw-s 00000000 00:00 0 
7f0004000000-7f00041ff000 rw-p 00000000 00:00 0 
7ffc00000000-7ffc00400000 rw-p 00000000 00:00 0                          [stack]
"""


def test_places_are_whole_pages_of_anonymous_memory():
    heap = set(range(0x200000, 0xA00000, SIZE))
    assert hugepages.places_in(MAPS) == heap | {0x7F0000200000, 0x7F0000400000}


def test_asking_changes_no_content():
    before = hugepages.places()
    memory = mmap.mmap(-1, 4 * SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(memory, np.int64)
    array[:] = np.arange(array.size)
    new = hugepages.places() - before
    assert hugepages.ask(new) <= len(new)
    np.testing.assert_array_equal(array, np.arange(array.size))


def test_no_setting_no_places(tmp_path, monkeypatch):
    monkeypatch.setattr(hugepages, "SETTING", tmp_path / "missing")
    assert hugepages.places() == set() and hugepages.ask(set()) == 0
    setting = tmp_path / "enabled"
    setting.write_text("always madvise [never]\n")
    monkeypatch.setattr(hugepages, "SETTING", setting)
    assert hugepages.places() == set()


def test_gathered_blocks_lie_side_by_side_in_the_heap():
    """In a process of its own: malloc takes blocks of a few MiB from the heap, where huge pages fit, not each from a
    mapping."""
    code = (
        "import sys, numpy as np\n"
        "from engines import hugepages\n"
        "if sys.argv[1] == 'gather': assert hugepages.gather()\n"
        "before = hugepages.places()\n"
        "kept = [np.ones(3 << 18) for _ in range(16)]\n"  # 6 MiB each: a mapping of its own holds two pages, or three
        "print(len(hugepages.places() - before))\n"
    )
    pages = lambda how: int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout)
    if not hugepages.places():
        pytest.skip("this system gives no huge pages")
    assert pages("gather") >= 16 * 3 - 1 > pages("alone")
