"""Print the lowest version of everything `pyproject.toml` depends on, as constraints for pip.

    python scripts/minimum_versions.py > lowest.txt
    pip install -c lowest.txt '.[test,escnn]'

The checks run with these too, so that every lower bound has been tested. Needs Python 3.11.
"""

from pathlib import Path

import tomllib
from packaging.requirements import Requirement

EXTRAS = ("test", "escnn")


def lowest(requirements: list[str], project: dict) -> list[str]:
    """`name==bound` for each `name>=bound`, none without a lower bound; extras of this package are expanded."""
    pins = []
    for requirement in map(Requirement, requirements):
        if requirement.name == project["name"]:
            for extra in requirement.extras:
                pins += lowest(project["optional-dependencies"][extra], project)
        bounds = [specifier.version for specifier in requirement.specifier if specifier.operator in (">=", "==")]
        pins += [f"{requirement.name}=={bound}" for bound in bounds]
    return pins


def main() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    everything = [*project["dependencies"], f"{project['name']}[{','.join(EXTRAS)}]"]
    print("\n".join(sorted(set(lowest(everything, project)))))


if __name__ == "__main__":
    main()
