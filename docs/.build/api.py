"""
Writes `tests/api.txt`: every public name with its arguments and their defaults, and every option of the commands.

    python docs/.build/api.py

Public are the names in `hf_genarm.__all__` and `docs/reference.md`. A test compares the file with the source, so that
no name or argument changes unnoticed, and the difference of the file shows a reviewer what users will notice.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).parent.parent.parent
SNAPSHOT = ROOT / "tests" / "api.txt"
MARKS = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}


def arguments(function: griffe.Function | griffe.Class) -> str:
    """The arguments of a function or class in parentheses: names and defaults, without annotations."""
    parts, keyword_only = [], False
    for parameter in function.parameters:
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is griffe.ParameterKind.keyword_only and not keyword_only:
            parts.append("*")
        keyword_only |= parameter.kind in (
            griffe.ParameterKind.keyword_only,
            griffe.ParameterKind.var_positional,
        )
        mark = MARKS.get(parameter.kind, "")
        # A default that is a long expression tells a reader of this list nothing.
        default = str(parameter.default) if len(str(parameter.default)) < 40 else "…"
        default = "" if mark or parameter.default is None else f"={default}"
        parts.append(f"{mark}{parameter.name}{default}")
    return f"({', '.join(parts)})"


def described(name: str, item: griffe.Object | griffe.Alias) -> Iterator[str]:
    """The lines of the list for one public object and its public members."""
    if item.is_function:
        yield name + arguments(item)
    elif item.is_class:
        yield name + arguments(item)
        for member_name, member in item.all_members.items():
            if not member_name.startswith("_"):
                yield from described(f"{name}.{member_name}", member)
    else:
        yield name


def options(package: griffe.Module) -> Iterator[str]:
    """The options of each command, without those that come from TRL and transformers."""
    scripts = package["scripts"].modules
    groups = {x: scripts[x]["ARGUMENTS"].value for x in scripts if "ARGUMENTS" in scripts[x].members}
    listed = re.findall(r"'(\w+)': \(([^)]*)\)", str(groups.pop("arguments")))
    for command, names in [*groups.items(), *listed]:
        for group in re.findall(r"\w+", str(names)):
            script = scripts[command] if command in groups else scripts["arguments"]
            for name, member in script[group].all_members.items():
                if member.is_attribute and "property" not in member.labels and not name.startswith("_"):
                    yield f"hf-genarm {command.replace('_', '-')} --{name}"


def public_api() -> str:
    """The text of the file that fits the source."""
    package = griffe.load("hf_genarm", search_paths=[ROOT], try_relative_path=False, allow_inspection=False)
    pages = re.findall(r"^::: hf_genarm\.(\S+)", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), re.M)
    objects = {path.rsplit(".", 1)[-1]: package[path] for path in pages}
    objects |= {name: package[name] for name in package.exports}
    lines = set(options(package))
    for name, item in objects.items():
        members = item.members if item.is_module else {}
        lines.update(described(name, item) if not item.is_module else ())
        for member_name, member in members.items():
            if not member_name.startswith("_") and not member.is_alias and member.is_function:
                lines.update(described(f"{name}.{member_name}", member))
    return "\n".join(sorted(lines)) + "\n"


if __name__ == "__main__":
    SNAPSHOT.write_text(public_api(), encoding="utf-8")
