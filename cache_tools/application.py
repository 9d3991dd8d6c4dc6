"""The Typer application of both programs: options that they share, errors and exit codes."""

import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .console import guarded, say
from .errors import UsageError


class _Group(TyperGroup):
    """A group whose commands, help and version are `guarded`."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        return guarded(super().make_context)(*args, **options)

    def invoke(self, *args: Any) -> Any:
        return guarded(super().invoke)(*args)

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            return super().main(*args, **options)
        except OSError:  # the two methods above handle all but the printing of a usage error
            say("", sys.stderr)
            sys.exit(UsageError.exit_code)


def application(name: str, purpose: str) -> typer.Typer:
    """Return an application without commands; `purpose` is the first line of its help."""
    app = typer.Typer(
        cls=_Group,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )

    def show(asked: bool) -> None:
        if asked:
            from .schema import CacheIdentity

            format_version = CacheIdentity.model_fields["version"].default
            number = version("masked-channel-modeling")
            typer.echo(f"{name} {number} (cache format {format_version})")
            raise typer.Exit

    option = typer.Option("--version", callback=show, is_eager=True, help="Print the version.")

    @app.callback(help=purpose)
    def options(version: Annotated[bool, option] = False) -> None:
        pass

    return app
