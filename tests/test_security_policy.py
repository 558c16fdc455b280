"""SECURITY.md is true: the tests it names are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
POLICY = (ROOT / "SECURITY.md").read_text()
THREATS = [line.strip("| ").split(" | ") for line in POLICY.partition("| threat |")[2].splitlines()[2:] if line.startswith("|")]


def test_each_threat_is_held_off_by_tests_that_exist() -> None:
    assert THREATS
    for threat, _, tests in THREATS:
        named = re.findall(r"`(tests/\w+\.py)::(test_\w+)`", tests)
        assert named, threat
        assert tests.count("`") == 2 * len(named), threat
        missing = [name for file, name in named if not re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE)]
        assert missing == [], threat
