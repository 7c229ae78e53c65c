"""
Lists all errors, warnings and log lines of the package with their places, to read them together.

    python docs/.build/messages.py
"""

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
# Functions and methods that show their arguments to users
SHOWING = {"warn", "warning", "warning_once", "info", "print", "exit", "error"}


def text_of(node: ast.expr) -> str:
    """The text of a string expression, with the code of what is filled in; empty for other expressions."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(
            x.value if isinstance(x, ast.Constant) else "{" + ast.unparse(x.value) + "}" for x in node.values
        )
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return ""


def messages(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yields line, kind and text of each message in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            call, kind = node.exc, ast.unparse(node.exc.func)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            call, kind = node, node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if kind not in SHOWING:
                continue
        else:
            continue
        text = " ".join("".join(map(text_of, call.args)).split())
        if text:
            yield node.lineno, kind, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    for path in sorted((ROOT / "hf_genarm").rglob("*.py")):
        for line, kind, text in messages(path):
            print(f"{path.relative_to(ROOT)}:{line}: {kind}: {text}")


if __name__ == "__main__":
    main()
