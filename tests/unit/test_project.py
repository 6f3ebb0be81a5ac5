"""The repository itself: the lock is index-neutral, the README is current, versions stand in one place."""

import re
import subprocess

from sidestep.config.places import PROJECT, product_version
from sidestep.config.readme import README, renewed


def committed(name: str) -> str:
    shown = subprocess.run(
        ["git", "show", f"HEAD:{name}"], cwd=PROJECT, capture_output=True, text=True, encoding="utf-8", check=True
    )
    return shown.stdout


def test_the_committed_lock_names_no_addresses():
    lock = committed("uv.lock")
    assert "://" not in lock
    assert set(re.findall(r'registry = "([^"]*)"', lock)) == {"index"}
    assert "[package.metadata" not in lock
    assert re.search(r'name = "torch"\nversion = "2\.11\.', lock)
    assert re.search(r'name = "torchaudio"\nversion = "2\.11\.', lock)


def test_the_argument_reference_of_the_readme_is_current():
    text = README.read_text(encoding="utf-8")
    assert renewed(text) == text, "run: python -m sidestep.config.readme"


def test_the_changelog_has_the_current_version():
    assert f"## {product_version()}" in (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
