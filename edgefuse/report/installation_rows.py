"""What is installed and attached: targets, devices and packages, as tables of words."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from edgefuse.device import Device
    from edgefuse.packages import Need
    from edgefuse.target import Target

TARGETS = ("target", "makes", "file", "state")
DEVICES = ("device", "what", "clock", "state")
NEEDS = ("package", "installed", "wanted", "by", "state")


def target_rows(shelf: Mapping[str, EntryPoint]) -> list[tuple[str, ...]]:
    """One row per target, in the order of `TARGETS`."""
    rows: list[tuple[str, ...]] = []
    for name, point in shelf.items():
        target = cast("Target", point.load())
        lacking = target.missing()
        state = f"missing; pip install {' '.join(lacking)}" if lacking else "ready"
        rows.append((name, target.SUMMARY, f"model{target.SUFFIX}", state))
    return rows


def device_rows(shelf: Mapping[str, EntryPoint]) -> list[tuple[str, ...]]:
    """One row per device that is found, and one per kind that lacks something, in the order of `DEVICES`."""
    rows: list[tuple[str, ...]] = []
    for name, point in shelf.items():
        device = cast("Device", point.load())
        if lacking := device.missing():
            wants, mends = ", ".join(lack.what for lack in lacking), "; ".join(dict.fromkeys(lack.mend for lack in lacking))
            rows.append((name, device.SUMMARY, "-", f"needs {wants}; {mends}"))
            continue
        found = device.found()
        rows += [(each.spec, each.name, each.clock, "ready") for each in found]
        rows += [] if found else [(name, device.SUMMARY, "-", "none is found")]
    return rows


def need_rows(needs: Sequence[Need]) -> list[tuple[str, ...]]:
    """One row per package, in the order of `NEEDS`."""
    return [(need.package, need.installed or "-", need.wanted, need.by, need.state) for need in needs]


def needs_json(needs: Sequence[Need], repair: str | None) -> dict[str, Any]:
    """The same for programs."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": [dataclasses.asdict(need) for need in needs],
        "repair": repair,
    }
