"""Print the requirements of an extra or a dependency group of pyproject.toml, one per line.

References to other extras and groups are opened: `pip install .[extra]` would build xtoken as well,
which the Makefile builds apart.
"""

import re
import sys
import tomllib
from pathlib import Path


def requirements(pyproject: dict, name: str) -> list[str]:
    """What an extra or a group requires, that of the package itself not among it."""
    extras = pyproject["project"]["optional-dependencies"]
    found = []
    for requirement in extras[name] if name in extras else pyproject["dependency-groups"][name]:
        if isinstance(requirement, dict):
            found += requirements(pyproject, requirement["include-group"])
        elif own := re.fullmatch(r"xtoken\[(\w+)\]", requirement):
            found += pyproject["project"]["dependencies"] + requirements(pyproject, own[1])
        else:
            found.append(requirement)
    return found


def main() -> None:
    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    content = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    found = [line for name in sys.argv[1:] for line in requirements(content, name)]
    print("\n".join(dict.fromkeys(found)))


if __name__ == "__main__":
    main()
