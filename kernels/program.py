"""All driver calls of a recorded call in one call of C.

Between the other operations of a model, each call through ctypes costs the host 1 to 3 us. The builder of Triton's own
launchers compiles this module once and keeps it in Triton's cache on disk.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, partial
from itertools import chain
from struct import pack
from types import ModuleType

from triton.runtime.build import compile_module_from_src

SOURCE = r"""
#include <Python.h>
#include <stdint.h>

enum { MOST_MEMORIES = 32 };

typedef struct {
    uint64_t *target;
    int64_t memory, offset;
} Place;

typedef struct {
    int (*launch)(void *config, void *function, void **parameters, void **extra);
    void *config, *function, **parameters;
} Start;

typedef struct {
    int (*replace)(void *map, void *address);
    int64_t num_addresses, num_maps, num_starts;
    /* Place addresses[num_addresses], maps[num_maps]; Start starts[num_starts]; */
} Program;

/* run(program, *memories): write all addresses and tensor maps, then launch; returns the driver's error code. */
static PyObject *run(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    uint64_t memories[MOST_MEMORIES];
    if (count < 1 || count - 1 > MOST_MEMORIES) {
        PyErr_SetString(PyExc_ValueError, "run takes a program and at most 32 memories");
        return NULL;
    }
    const Program *program = PyLong_AsVoidPtr(args[0]);
    for (Py_ssize_t i = 1; i < count; i++) memories[i - 1] = PyLong_AsUnsignedLongLong(args[i]);
    if (PyErr_Occurred()) return NULL;
    int error = 0;
    Py_BEGIN_ALLOW_THREADS
    const Place *place = (const Place *)(program + 1);
    for (int64_t i = 0; i < program->num_addresses; i++, place++)
        *place->target = memories[place->memory] + place->offset;
    for (int64_t i = 0; i < program->num_maps && !error; i++, place++)
        error = program->replace(place->target, (void *)(memories[place->memory] + place->offset));
    place = (const Place *)(program + 1) + program->num_addresses + program->num_maps;
    const Start *start = (const Start *)place;
    for (int64_t i = 0; i < program->num_starts && !error; i++, start++)
        error = start->launch(start->config, start->function, start->parameters, NULL);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(error);
}

static PyMethodDef methods[] = {{"run", (PyCFunction)(void (*)(void))run, METH_FASTCALL, NULL}, {NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "stem_program", NULL, -1, methods};

PyMODINIT_FUNC PyInit_stem_program(void) { return PyModule_Create(&definition); }
"""


@cache
def library() -> ModuleType:
    """Module with `run`, compiled on first use."""
    return compile_module_from_src(SOURCE, "stem_program")


class Program:
    """Driver calls that are repeated with other addresses.

    Args:
        replace: Address of the function cuTensorMapReplaceAddress, 0 without maps.
        addresses: (where the address is written, number of a memory, offset in it in bytes) of each one that differs.
        maps: The same for each tensor map.
        starts: (address of the function cuLaunchKernelEx, its config, function and parameters) of each launch.
    """

    def __init__(
        self,
        replace: int,
        addresses: Sequence[tuple[int, int, int]],
        maps: Sequence[tuple[int, int, int]],
        starts: Sequence[tuple[int, int, int, int]],
    ) -> None:
        numbers = [replace, len(addresses), len(maps), len(starts), *chain(*addresses, *maps, *starts)]
        self._memory = ctypes.create_string_buffer(pack(f"{len(numbers)}Q", *numbers))
        self.run = partial(library().run, ctypes.addressof(self._memory))
        """run(*memories) writes the addresses and launches; returns the driver's error code, 0 for none.

        Memories are the addresses of at most 32 tensors. Threads take turns.
        """
