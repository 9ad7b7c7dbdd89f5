"""Exit with 0 if this Python has what setup.py requires, else print what is missing and exit with 1.

python scripts/check_environment.py [EXTRA…]
"""

import ast
import importlib.metadata
import sys
from pathlib import Path


def requirements(extras):
    """Return the requirement strings of setup.py with some extras, without running it: setuptools may be missing."""
    tree = ast.parse((Path(__file__).resolve().parents[1] / "setup.py").read_text())
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return values["CORE"] + [line for extra in extras if extra != "core" for line in values["EXTRAS"][extra]]


def problems(lines):
    """Return one text for each requirement that is not met."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ["packaging is not installed"]
    unmet = []
    for line in lines:
        requirement = Requirement(line)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            unmet.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{requirement.name} {version} does not meet {requirement.specifier}")
    return unmet


if __name__ == "__main__":
    missing = problems(requirements(sys.argv[1:]))
    if sys.version_info < (3, 10):  # noqa: UP036 - this is the file that finds out
        missing.insert(0, f"Python {sys.version.split()[0]} is older than 3.10")
    print("; ".join(missing))
    sys.exit(1 if missing else 0)
