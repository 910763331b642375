"""What is there, what is missing, and what mends it: `targets`, `devices`, `doctor`."""

from __future__ import annotations

import click

from edgefuse.cli.options import json_option, verbose_option
from edgefuse.errors import MissingPackage


@click.command()
@json_option
def targets(as_json: bool) -> None:
    """List the targets, and whether their packages are installed."""
    from edgefuse.report import installation_rows, terminal
    from edgefuse.target import shelf

    found = installation_rows.target_rows(shelf())
    if as_json:
        terminal.show_json([dict(zip(("target", "makes", "file", "state"), row, strict=True)) for row in found])
    else:
        terminal.show_table(installation_rows.TARGETS, found)


@click.group(invoke_without_command=True)
@click.pass_context
@json_option
def devices(context: click.Context, as_json: bool) -> None:
    """List the devices that are found now, what is missing, and the command that mends it."""
    if context.invoked_subcommand is not None:
        return
    from edgefuse.device import shelf
    from edgefuse.report import installation_rows, terminal

    with terminal.step("Looking for devices"):
        found = installation_rows.device_rows(shelf())
    if as_json:
        terminal.show_json([dict(zip(("device", "what", "clock", "state"), row, strict=True)) for row in found])
    else:
        terminal.show_table(installation_rows.DEVICES, found)


@devices.command()
@click.argument("name")
@verbose_option
def setup(name: str) -> None:
    """Fetch and build what the devices of kind NAME need; goes on where it was stopped."""
    from edgefuse.device import kind
    from edgefuse.report import terminal

    kind(name).setup(terminal.step)


@click.command()
@click.option("--target", "-t", "chosen", multiple=True, help="Only what this target needs; may be given several times.")
@json_option
def doctor(chosen: tuple[str, ...], as_json: bool) -> None:
    """Show versions and conflicts, what is missing, and the pip command that mends it."""
    from edgefuse.packages import extras, needs, repair
    from edgefuse.report import installation_rows, terminal

    found = needs(chosen or extras())
    command = repair(found)
    if as_json:
        terminal.show_json(installation_rows.needs_json(found, command))
    else:
        terminal.show_table(installation_rows.NEEDS, installation_rows.need_rows(found))
    if command:
        raise MissingPackage("Packages are missing or in conflict.", hint=f"Mend it with: {command}")
