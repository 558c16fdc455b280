"""Says what pip-audit found, from its output in JSON on standard input; exits with 1 where a package has a known vulnerability."""

import json
import sys


def report(output: str) -> list[dict[str, object]]:
    """Its packages; none where it ended with something else, as without a network."""
    for line in output.splitlines():
        if line.startswith('{"dependencies"'):
            return list(json.loads(line)["dependencies"])
    return []


def main(lock: str, output: str) -> int:
    packages = report(output)
    bad = [package for package in packages if package.get("vulns")]
    skipped = [str(package["skip_reason"]) for package in packages if "skip_reason" in package]
    for package in bad:
        print(f"audit of {lock}: {package['name']} {package['version']} has known vulnerabilities: {package['vulns']}")
    if skipped or not packages:
        last = output.strip().splitlines()[-1:] or ["pip-audit said nothing"]
        print(f"audit of {lock}: NOT AUDITED {len(skipped) or 'any'} of {len(packages) or 'its'} packages: {(skipped or last)[0]}")
    if packages and not skipped and not bad:
        print(f"audit of {lock}: {len(packages)} packages, no known vulnerability")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.stdin.read()))
