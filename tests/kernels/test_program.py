"""stem.kernels.program: addresses and tensor maps are rewritten before the launches, which end at an error."""

import ctypes

import pytest
from stem.kernels.driver import address_of
from stem.kernels.program import Program, library

REPLACE = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 2)
LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)


def program(slots, replace_error=0, launch_error=0):
    """Two addresses, two maps and two launches; and what the driver is told, kept alive with the functions."""
    told = []
    functions = (
        REPLACE(lambda place, address: told.append(("map", place, address)) or replace_error),
        LAUNCH(lambda *args: told.append((list(slots), *args)) or launch_error),
    )
    replace, launch = map(address_of, functions)
    start = ctypes.addressof(slots)
    places, maps = [(start, 2, 0), (start + 8, 0, 48)], [(64, 1, 0), (128, 0, 16)]
    return Program(replace, places, maps, [(launch, 1, 2, 3), (launch, 4, 5, 6)]), told, functions


def test_launches_see_the_new_addresses():
    slots = (ctypes.c_uint64 * 2)()
    made, told, _ = program(slots)
    high = 0xFFFF_8000_0000_0000  # an address of 64 bits
    assert made.run(1000, 2000, high) == 0
    maps, launches = (
        [("map", 64, 2000), ("map", 128, 1016)],
        [([high, 1048], 1, 2, 3, None), ([high, 1048], 4, 5, 6, None)],
    )
    assert told == maps + launches
    told.clear()
    assert made.run(1, 2, 3) == 0 and told[-1] == ([3, 49], 4, 5, 6, None)


def test_an_error_of_the_driver_ends_the_call():
    slots = (ctypes.c_uint64 * 2)()
    made, told, _ = program(slots, launch_error=7)
    assert made.run(1, 2, 3) == 7 and len(told) == 3
    made, told, _ = program(slots, replace_error=9)
    assert made.run(1, 2, 3) == 9 and told == [("map", 64, 2)]


def test_bad_arguments_are_refused():
    made, told, _ = program((ctypes.c_uint64 * 2)())
    with pytest.raises(ValueError, match="at most 32 memories"):
        made.run(*range(33))
    with pytest.raises(OverflowError):
        made.run(-1, 2, 3)
    with pytest.raises(TypeError):
        made.run(None, 2, 3)
    with pytest.raises(ValueError, match="takes a program"):
        library().run()
    assert told == []
