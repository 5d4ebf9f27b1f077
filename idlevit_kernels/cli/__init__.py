"""The command line: ``idlevit`` or ``python -m idlevit_kernels``, one file a command."""

from __future__ import annotations

import typer

from . import bench, evaluate, export, info, train, tune, visualize

app = typer.Typer(
    help="Vision Transformers whose tokens idle instead of being dropped (IdleViT), made fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(info.info)
app.command()(bench.bench)
app.command()(visualize.visualize)
app.command()(tune.tune)
app.command()(export.export)
app.command()(train.train)
app.command(name="eval")(evaluate.evaluate)


def main() -> None:
    app(prog_name="idlevit")
