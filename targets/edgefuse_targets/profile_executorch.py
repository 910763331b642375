"""Where the time of a method goes: ExecuTorch's ETDump, which XNNPACK adds its own operators to.

XNNPACK's clock counts whole microseconds and cuts off the rest, so that hundreds of small operators lack up to one each.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from executorch.devtools import Inspector

from edgefuse_targets.executorch import binding
from edgefuse_targets.profiles import OUTSIDE, WARM_UP, XNNPACK, Event, profile_of, timed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from numpy.typing import NDArray

    from edgefuse.measurement import Profile
    from edgefuse.values import Artifact

KERNEL = "native_call_"  # what ETDump puts before an operator outside the delegates
NS_PER_MS = 1_000_000


def profiled(artifact: Artifact, entry: str, inputs: Mapping[str, NDArray[np.float32]]) -> Profile:
    """Run a method many times on the same inputs; ExecuTorch's pool of threads is ready."""
    given = [torch.from_numpy(np.array(inputs[spec.name], np.float32)) for spec in artifact.inputs[entry]]
    program = binding()._load_program(str(artifact.path), enable_etdump=True)  # noqa: SLF001 - no public way to several methods
    method = program.load_method(entry)
    method.set_inputs(given)
    taken = timed(method.execute)
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder, "calls.etdp")
        program.write_etdump_result_to_file(str(dump))
        events = [list(_events(each)) for block in Inspector(etdump_path=str(dump)).event_blocks for each in block.events]
    columns = [column for column in events if len(column) == WARM_UP + len(taken)]
    return profile_of([(ns, [column[WARM_UP + call] for column in columns]) for call, ns in enumerate(taken)])


def _events(event: Any) -> Iterator[Event]:  # noqa: ANN401 - the Inspector's own
    """One operator, call by call; nothing of what is around operators."""
    if event.perf_data is None or not (event.is_delegated_op or event.name.startswith(KERNEL)):
        return
    where, name = (
        (XNNPACK, event.name.partition(" #")[0]) if event.is_delegated_op else (OUTSIDE, event.name.removeprefix(KERNEL))
    )
    yield from (Event(name, where, round(each * NS_PER_MS)) for each in event.perf_data.raw)
