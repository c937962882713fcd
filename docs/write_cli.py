"""Writes docs/cli.md from the command line's own definitions: ``python docs/write_cli.py`` (``make docs``).

From the definitions and not from the rendered help, whose layout changes with the library's version.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import typer

HEAD = """# The command line

Written by `make docs`; a test compares. Exit codes: [exit-codes.md](exit-codes.md).
"""


def section(name: str, command: Any) -> str:
    """One verb: what it does, its arguments and options, an example."""
    lines = [f"## fedblocks {name}", "", inspect.cleandoc(command.help or ""), ""]
    rows = []
    for param in command.params:
        about = (getattr(param, "help", None) or "").replace("|", "\\|")
        if param.param_type_name == "argument":
            rows.append(f"| `{(param.metavar or param.name).upper()}` | {about} |")
        elif param.name != "help":
            names = ", ".join(f"`{opt}`" for opt in (*param.opts, *param.secondary_opts))
            has_default = param.default not in (None, False, ()) and not callable(param.default)
            default = f" (default `{param.default}`)" if has_default else ""
            rows.append(f"| {names} | {about}{default} |")
    if rows:
        lines += ["| | |", "|---|---|", *rows, ""]
    return "\n".join([*lines, f"`{command.epilog.removeprefix('Example: ')}`"])


def document() -> str:
    """The whole page."""
    from fedblocks.cli import app

    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(app).commands.items():
        inner = getattr(command, "commands", None)
        found.update({f"{name} {sub}": c for sub, c in inner.items()} if inner else {name: command})
    keys = Path(__file__).with_name("json-keys.md").read_text(encoding="utf-8")
    return "\n\n".join([HEAD.rstrip(), *(section(name, found[name]) for name in sorted(found)), keys])


if __name__ == "__main__":
    Path(__file__).with_name("cli.md").write_text(document(), encoding="utf-8")
