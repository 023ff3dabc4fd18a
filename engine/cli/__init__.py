"""The command line. `main` is the entry point `recall`.

A module per command. Modules are light at the top and import the engine inside their functions, because numba
and pyarrow take half a second that `recall --help` need not wait for.

Exit status: 0 done; 1 a server could not answer; 2 wrong usage, configuration or data; 130 interrupted.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from engine import __version__
from engine.cli.bench import app as bench_app
from engine.cli.build import build
from engine.cli.check import check
from engine.cli.data import app as data_app
from engine.cli.demo import demo
from engine.cli.evaluate import evaluate
from engine.cli.ingest import ingest
from engine.cli.inspect import app as inspect_app
from engine.cli.query import query
from engine.cli.releases import app as releases_app
from engine.cli.releases import publish
from engine.cli.serve import serve
from engine.cli.synth import synth
from engine.cli.train import train
from engine.cli.tune import tune
from engine.console import say_error
from engine.core.errors import RecallError


class Commands(TyperGroup):
    """The commands, with this project's own errors and Ctrl-C made one line and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except RecallError as error:
            say_error(str(error))
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            say_error("interrupted")
            raise typer.Exit(130) from error


app = typer.Typer(
    name="recall",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"recall {__version__}")
        raise typer.Exit


@app.callback()
def recall(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve recall (candidate generation) for recommender systems: build channels, serve them, ask them."""


app.command("demo")(demo)
app.command("build")(build)
app.command("train")(train)
app.command("serve")(serve)
app.command("publish")(publish)
app.command("query")(query)
app.command("ingest")(ingest)
app.command("check")(check)
app.command("eval")(evaluate)
app.command("tune")(tune)
app.command("synth")(synth)
app.add_typer(bench_app, name="bench")
app.add_typer(data_app, name="data")
app.add_typer(inspect_app, name="inspect")
app.add_typer(releases_app, name="releases")


def main() -> None:
    """Run the command line."""
    app()
