"""Print the requirements of one extra of pyproject.toml, with references to other extras opened.

`pip install .[extra]` would build xtoken as well; the Makefile builds it apart.
"""

import re
import sys
import tomllib
from pathlib import Path


def requirements(project: dict, extra: str) -> list[str]:
    found = []
    for requirement in project["optional-dependencies"][extra]:
        own = re.fullmatch(r"xtoken\[(\w+)\]", requirement)
        found += requirements(project, own[1]) if own else [requirement]
    return found


def main() -> None:
    extra = sys.argv[1]
    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    content = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    found = content["dependency-groups"].get(extra)
    if found is None:
        found = content["project"]["dependencies"] + requirements(content["project"], extra)
    print("\n".join(found))


if __name__ == "__main__":
    main()
