"""Where the time of a signature goes: the profiler of LiteRT's compiled models, through the C interface of the wheel's library.

The wheel has no headers; the declarations below are those of the version that `tflite.PACKAGES` pins. What the profiler tells is
a table to be read by people, of averages, in whole microseconds: it is asked for after each call, and read line by line.
"""

from __future__ import annotations

import ctypes
import re
from ctypes import byref, c_char_p, c_int, c_int32, c_size_t, c_uint, c_uint32, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING

import ai_edge_litert
import numpy as np

from edgefuse_targets.profiles import OUTSIDE, WARM_UP, XNNPACK, Event, profile_of, timed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from numpy.typing import NDArray

    from edgefuse.measurement import Profile
    from edgefuse.values import Artifact

CPU, WRITE = 1, 1  # LiteRT's numbers of an accelerator and of a way to lock a buffer
DELEGATED = "Delegate/"
NS_PER_MS = 1_000_000
END = "Top by Computation Time"  # behind the table in the order of the run
LINE = re.compile(r"\s*(?P<name>\S.*?)\s{2,}[\d.]+\s+[\d.]+\s+(?P<ms>[\d.]+)\s+[\d.]+%\s+[\d.]+%\s+[\d.]+\s+\d+\s+\S.*")


class _Layout(ctypes.Structure):
    _fields_ = (("rank", c_uint, 7), ("has_strides", c_uint, 1), ("dimensions", c_int32 * 8), ("strides", c_uint32 * 8))


class _TensorType(ctypes.Structure):
    _fields_ = (("element", c_int), ("layout", _Layout))


def profiled(artifact: Artifact, entry: str, inputs: Mapping[str, NDArray[np.float32]], threads: int) -> Profile:
    """Run a signature many times on the same inputs."""
    model = _Model(artifact.path, entry, threads)
    model.give(inputs)
    tables: list[str] = []
    taken = timed(model.run, after=lambda: tables.append(model.summary()))
    return profile_of([(ns, list(events(table))) for ns, table in zip(taken, tables[WARM_UP:], strict=True)])


def events(table: str) -> Iterator[Event]:
    """The operators of a profiler's table, in the order of the run."""
    for line in table.partition(END)[0].splitlines():
        if match := LINE.fullmatch(line):
            name, time_ns = match["name"], round(float(match["ms"]) * NS_PER_MS)
            delegated = name.startswith(DELEGATED)
            yield Event(name.removeprefix(DELEGATED), XNNPACK if delegated else OUTSIDE, time_ns)


class _Model:
    """A compiled model with its profiler, and buffers for one signature; it lives as long as its process."""

    def __init__(self, path: Path, entry: str, threads: int) -> None:
        self._library = ctypes.CDLL(str(Path(ai_edge_litert.__file__).with_name("libLiteRt.so")))
        self._environment = self._made("LiteRtCreateEnvironment", c_int(0), None)
        model = self._made("LiteRtCreateModelFromFile", self._environment, c_char_p(str(path).encode()))
        options = self._made("LiteRtCreateOptions")
        self._do("LiteRtSetOptionsHardwareAccelerators", options, c_int(CPU))
        self._option(options, b"runtime_options_string", b"enable_profiling = true\n")
        self._option(options, b"xnnpack", b"num_threads = %d\n" % threads)
        self._compiled = self._made("LiteRtCreateCompiledModel", self._environment, model, options)
        self._profiler = self._made("LiteRtCompiledModelGetProfiler", self._compiled)
        self._number, signature = self._signature(model, entry)
        self._inputs, self._outputs = self._buffers(signature, "Input"), self._buffers(signature, "Output")

    def give(self, inputs: Mapping[str, NDArray[np.float32]]) -> None:
        """Copy the inputs into their buffers."""
        for name, buffer in self._inputs.items():
            content = np.ascontiguousarray(inputs[name], np.float32)
            place = self._made("LiteRtLockTensorBuffer", buffer, after=(c_int(WRITE),))
            ctypes.memmove(place, content.ctypes.data, content.nbytes)
            self._do("LiteRtUnlockTensorBuffer", buffer)

    def run(self) -> None:
        """Call the signature once."""
        each = [(c_void_p * len(buffers))(*(b.value for b in buffers.values())) for buffers in (self._inputs, self._outputs)]
        sides = [part for array in each for part in (c_size_t(len(array)), array)]
        self._do("LiteRtRunCompiledModel", self._compiled, c_size_t(self._number), *sides)

    def summary(self) -> str:
        """What the profiler tells since it was last asked."""
        self._do("LiteRtStopProfiler", self._profiler)
        told = self._made("LiteRtGetProfileSummary", self._profiler, self._compiled)
        self._do("LiteRtResetProfiler", self._profiler)
        self._do("LiteRtStartProfiler", self._profiler)
        return ctypes.string_at(told).decode(errors="replace")

    def _signature(self, model: c_void_p, entry: str) -> tuple[int, c_void_p]:
        number = c_size_t()
        self._do("LiteRtGetNumModelSignatures", model, byref(number))
        for index in range(number.value):
            signature = self._made("LiteRtGetModelSignature", model, c_size_t(index))
            if self._text("LiteRtGetSignatureKey", signature) == entry:
                return index, signature
        raise ValueError(f"it lacks the entry {entry}")

    def _buffers(self, signature: c_void_p, side: str) -> dict[str, c_void_p]:
        """A buffer for each tensor of a side, by its name."""
        number = c_size_t()
        self._do(f"LiteRtGetNumSignature{side}s", signature, byref(number))
        buffers = {}
        for index in map(c_size_t, range(number.value)):
            tensor, kind = self._made(f"LiteRtGetSignature{side}TensorByIndex", signature, index), _TensorType()
            self._do("LiteRtGetRankedTensorType", tensor, byref(kind))
            wanted = self._made(f"LiteRtGetCompiledModel{side}BufferRequirements", self._compiled, c_size_t(self._number), index)
            name = self._text(f"LiteRtGetSignature{side}Name", signature, index)
            buffers[name] = self._made("LiteRtCreateManagedTensorBufferFromRequirements", self._environment, byref(kind), wanted)
        return buffers

    def _option(self, options: c_void_p, name: bytes, value: bytes) -> None:
        """An option as LiteRT's own wrappers give it: text that it frees itself."""
        memory = ctypes.CDLL(None)
        memory.strdup.restype, memory.strdup.argtypes = c_void_p, (c_char_p,)
        free = ctypes.cast(memory.free, c_void_p)
        option = self._made("LiteRtCreateOpaqueOptions", c_char_p(name), c_void_p(memory.strdup(value)), free)
        self._do("LiteRtAddOpaqueOptions", options, option)

    def _text(self, name: str, *arguments: Any) -> str:  # noqa: ANN401 - whatever ctypes passes
        return ctypes.string_at(self._made(name, *arguments)).decode()

    def _made(self, name: str, *arguments: Any, after: tuple[Any, ...] = ()) -> c_void_p:  # noqa: ANN401
        """What a function writes to the pointer that it takes last, or before what comes `after`."""
        made = c_void_p()
        self._do(name, *arguments, byref(made), *after)
        return made

    def _do(self, name: str, *arguments: Any) -> None:  # noqa: ANN401
        function = getattr(self._library, name)
        function.restype = c_int
        if (status := function(*arguments)) != 0:
            raise RuntimeError(f"{name} answers {status}")
