"""``idlevit info``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ..measure.info import collect


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Shows versions, devices, the backends (usable, or every reason why not), the build and the settings."""
    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        Console(highlight=False).print(_info_text(facts))


def _info_text(facts: dict[str, Any]) -> Group:
    env, isa = facts["environment"], facts["cpu_instruction_set"]
    cuda = env["cuda"]
    gpus = [f"{d['name']}, compute capability {d['capability']}, {d['memory_gib']} GiB" for d in cuda["devices"]]
    machine = {
        "idlevit_kernels": env["version"] + (f" (commit {env['commit']})" if env["commit"] else ""),
        "platform": env["platform"],
        **{name: _library_text(library) for name, library in facts["libraries"].items()},
        "CUDA": f"PyTorch is built for {cuda['torch_built_for'] or 'no CUDA'}; driver {cuda['driver'] or 'not found'}",
        "GPU": "\n".join(gpus) or "PyTorch finds none",
        "CPU": f"{env['cpu']}, {env['threads']} threads",
        "CPU kernels": f"{isa['in_use'] or 'not available'} in use; of {', '.join(isa['available']) or 'none'}",
        "CPU torch": isa["torch"],
    }
    backends = {
        name: Text("usable", "green")
        if backend["usable"]
        else Text.assemble(("not usable", "yellow"), *(f"\n- {reason}" for reason in backend["reasons"]))
        for name, backend in facts["backends"].items()
    }
    fast_paths = {
        gate["name"]: Text.assemble(("on", "green") if gate["available"] else ("off", "yellow"), f"\n{gate['detail']}")
        for gate in facts["fast_paths"]
    }
    build = {name: json.dumps(value) for name, value in facts["build"].items()}
    variables = {
        name: Text.assemble(
            "not set" if v["value"] is None else repr(v["value"]),
            (f"\n{v['error']}" if v["error"] else "", "red"),
            (f"\n{v['meaning']}", "dim"),
        )
        for name, v in facts["variables"].items()
    }
    return Group(
        _section("Installed", machine),
        _section("Backends, in the order that 'auto' tries them", backends),
        _section("Fast paths, as far as the versions of other libraries decide", fast_paths),
        _section("Build of the native extension", build or {"": "nothing recorded"}),
        _section("Environment variables", variables),
    )


def _library_text(library: dict[str, Any]) -> Text:
    floor = library["floor"]
    if library["installed"] is None:
        return Text(f"not installed ({floor} or newer)")
    if library["too_old"]:
        return Text(f"{library['installed']}, older than {floor}, the oldest version that is tested", "red")
    return Text(f"{library['installed']} ({floor} or newer)")


def _section(title: str, lines: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, min_width=18)
    table.add_column(overflow="fold")
    for name, value in lines.items():
        table.add_row(f"  {name}", value if isinstance(value, Text) else Text(str(value)))
    table.add_row()
    return table
