"""What a profile becomes in a table: by kind of operator, and operator by operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgefuse.measurement import Profile
    from edgefuse.profile import Profiled

PROFILE = ("target", "entry", "what", "operator", "count", "ms", "share")
REST = "runtime"  # what is in no operator: its kind is its only row
NS_PER_MS = 1_000_000
LEAST_SHARE = 0.005  # operators below it are in the row of their kind alone


def profile_rows(found: Sequence[Profiled]) -> list[tuple[str, ...]]:
    """Of each entry a row for the call, one for each kind of operator, the most expensive first, and below it its operators."""
    return [row for each in found for row in _rows(each)]


def profile_json(found: Sequence[Profiled]) -> list[dict[str, Any]]:
    """The same as data, kinds by share and operators as they were measured; a refusal in words."""
    return [
        {
            "target": each.target,
            "precision": each.precision,
            "entry": each.entry,
            "refusal": each.refusal or None,
            "call_ns": each.profile.call_ns if each.profile else None,
            "shares": shares(each.profile) if each.profile else {},
            "operators": [asdict(operator) for operator in each.profile.operators] if each.profile else [],
        }
        for each in found
    ]


def shares(profile: Profile) -> dict[str, float]:
    """Of each kind of operator its share of the call, the greatest first."""
    taken: Counter[str] = Counter()
    for each in profile.operators:
        taken[each.kind] += each.time_ns
    return {kind: _share(time_ns, profile) for kind, time_ns in taken.most_common()}


def _rows(found: Profiled) -> Iterator[tuple[str, ...]]:
    target = f"{found.target}, {found.precision}"
    if found.profile is None:
        yield (target, found.entry, found.refusal, "", "", "", "")
        return
    yield (target, found.entry, "a call", "", "", _ms(found.profile.call_ns), "100.0 %")
    for kind, share in shares(found.profile).items():
        of_kind = [each for each in found.profile.operators if each.kind == kind]
        count, time_ns = sum(each.count for each in of_kind), sum(each.time_ns for each in of_kind)
        yield ("", "", kind, "", str(count), _ms(time_ns), _percent(share))
        for each in of_kind if kind != REST else ():
            of_call = _share(each.time_ns, found.profile)
            if of_call >= LEAST_SHARE:
                where = ", outside the delegate" if each.where == "outside" else ""
                yield ("", "", "", f"{each.name}{where}", str(each.count), _ms(each.time_ns), _percent(of_call))


def _share(time_ns: int, profile: Profile) -> float:
    return time_ns / profile.call_ns if profile.call_ns else 0.0


def _ms(time_ns: int) -> str:
    return f"{time_ns / NS_PER_MS:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
