"""What `verify` and `bench` do with --budget."""

from __future__ import annotations

from collections.abc import Sequence

from edgefuse.errors import OverBudget
from edgefuse.values import Check


def show_budget(checks: Sequence[Check]) -> None:
    """The table of what was held against the budget; nothing without one."""
    from edgefuse.report import bundle_rows, terminal

    if checks:
        terminal.show_table(bundle_rows.CHECKS, bundle_rows.check_rows("budget", checks))


def require_kept(checks: Sequence[Check]) -> None:
    """Raise `OverBudget` where something is above its budget."""
    over = [check for check in checks if not check.passed]
    if over:
        more = f", and {len(over) - 1} more" if len(over) > 1 else ""
        raise OverBudget(
            f"{over[0].name} is {over[0].measured}, {over[0].required} allowed{more}.",
            hint="Mend it, or change the budget on purpose.",
        )
