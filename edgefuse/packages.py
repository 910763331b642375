"""What edgefuse needs, what is installed, and the pip command that mends the difference. Imports no package to find out."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from edgefuse import __version__

OURSELVES = "edgefuse"
State = Literal["ok", "missing", "conflict"]


@dataclass(frozen=True, slots=True)
class Need:
    """One requirement and how it stands.

    Attributes:
        package: its name.
        wanted: the requirement, as pip takes it.
        by: the package or the extra of edgefuse that wants it.
        installed: the version that is there, or None.
        state: whether that will do.
    """

    package: str
    wanted: str
    by: str
    installed: str | None
    state: State


def needs(extras: Sequence[str]) -> tuple[Need, ...]:
    """Every requirement of edgefuse with these extras, and every one of their own that is not met."""
    if not _installed():
        return (Need(OURSELVES, OURSELVES, OURSELVES, None, "missing"),)
    wanted = _direct(extras)
    inherited = _inherited([requirement for requirement, _ in wanted])
    return (*(_need(requirement, by) for requirement, by in wanted), *(need for need in inherited if need.state != "ok"))


def repair(found: Iterable[Need]) -> str | None:
    """The pip command that mends what is missing or in conflict; None when nothing is."""
    broken = sorted({need.wanted for need in found if need.state != "ok"})
    quoted = [f"'{wanted}'" if any(sign in wanted for sign in "<>![ ;") else wanted for wanted in broken]
    return f"pip install {' '.join(quoted)}" if quoted else None


def versions(extras: Sequence[str]) -> dict[str, str]:
    """Versions of edgefuse, Python, and what these extras need."""
    wanted = _direct(extras) if _installed() else []
    found = {need.package: need.installed for need in (_need(requirement, by) for requirement, by in wanted)}
    return {OURSELVES: __version__, "python": platform.python_version(), **{name: v for name, v in found.items() if v}}


def extras() -> tuple[str, ...]:
    """The extras of edgefuse that make it do more; not the sum of the others, nor what its developers and its corpus need."""
    offered = distribution(OURSELVES).metadata.get_all("Provides-Extra") if _installed() else None
    return tuple(sorted(name for name in offered or () if name not in ("all", "dev", "voices")))


def _installed() -> bool:
    """Whether edgefuse is an installed package, with its requirements written down; a bare source tree is not."""
    try:
        distribution(OURSELVES)
    except PackageNotFoundError:
        return False
    return True


def _direct(extras: Sequence[str]) -> list[tuple[Requirement, str]]:
    """What edgefuse requires, and what each extra requires beyond that, with the one who wants it."""
    wanted = [(requirement, OURSELVES) for requirement in _of_ourselves("")]
    return wanted + [(requirement, extra) for extra in extras for requirement in _of_ourselves(extra)]


def _of_ourselves(extra: str) -> Iterator[Requirement]:
    """Requirements of edgefuse, or of one of its extras alone."""
    for requirement in map(Requirement, requires(OURSELVES) or []):
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        if always == (not extra) and (marker is None or marker.evaluate({"extra": extra})):
            yield requirement


def _inherited(roots: Sequence[Requirement]) -> Iterator[Need]:
    """What the requirements require, and so on, each once."""
    waiting, seen = list(roots), set[str]()
    while waiting:
        parent = waiting.pop()
        key = f"{canonicalize_name(parent.name)}[{','.join(sorted(parent.extras))}]"
        if key in seen:
            continue
        seen.add(key)
        for requirement in _of(parent):
            yield _need(requirement, parent.name)
            waiting.append(requirement)


def _of(parent: Requirement) -> Iterator[Requirement]:
    """Requirements of an installed package with the extras that are wanted of it."""
    try:
        declared = requires(parent.name) or []
    except PackageNotFoundError:
        return
    environments: list[Mapping[str, str]] = [{"extra": extra} for extra in ("", *parent.extras)]
    for requirement in map(Requirement, declared):
        if requirement.marker is None or any(requirement.marker.evaluate(dict(each)) for each in environments):
            yield requirement


def _need(requirement: Requirement, by: str) -> Need:
    wanted = Requirement(str(requirement))
    wanted.marker = None
    try:
        installed: str | None = version(requirement.name)
    except PackageNotFoundError:
        installed = None
    state: State = "missing"
    if installed is not None:
        state = "ok" if requirement.specifier.contains(installed, prereleases=True) else "conflict"
    return Need(requirement.name, str(wanted), by, installed, state)
