"""Print the exact versions of all that requirements.txt needs, and of what that needs, as this environment has them: `make lock`.

Lines of name==version are constraints for pip and uv on any system: what a system does not need they leave out. A lock with
digests would be of one system and one build of torch, and would name the index that it was made with.
"""

import re
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LISTS = ("core", "dev", "mujoco")  # those of requirements.txt
HEAD = """\
# The versions that the tests passed with, on Python 3.11 and Linux. `make lock` writes this file. As constraints:
#   make install PIP_ARGS="-c requirements-lock.txt"     or     pip install -e . -c requirements-lock.txt
"""


def stated(path: Path) -> list[Requirement]:
    """The requirements in a list of ours."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def installed(wanted: list[Requirement]) -> dict[str, str]:
    """{name: version} of the requirements and of all that they need here."""
    found, left, seen = {}, list(wanted), set()
    while left:
        one = left.pop()
        name, key = canonicalize_name(one.name), (canonicalize_name(one.name), frozenset(one.extras))
        if key in seen:
            continue
        seen.add(key)
        found[name] = re.sub(r"\+.*", "", version(name))  # +cpu: any build of that version
        for text in requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in ("", *one.extras)):
                left.append(needed)
    return dict(sorted(found.items()))


if __name__ == "__main__":
    here = Path(__file__).parent
    pins = installed([one for name in LISTS for one in stated(here / f"{name}.txt")])
    print(HEAD + "\n".join(f"{name}=={number}" for name, number in pins.items()))
