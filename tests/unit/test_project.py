"""The repository itself: the lock is index-neutral, the README is current, versions stand in one place."""

import re
import subprocess
import tomllib

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


def test_uv_leaves_torch_on_windows_to_the_installer():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    pins = [name for name in project["project"]["dependencies"] if name.startswith("torch")]
    assert project["tool"]["uv"]["override-dependencies"] == [f"{pin}; sys_platform != 'win32'" for pin in pins]
    needed = re.findall(r'\{ name = "(torch(?:audio)?)"(.*?) \}', committed("uv.lock"))
    assert {name for name, _ in needed} == {"torch", "torchaudio"}
    assert all("sys_platform != 'win32'" in rest for _, rest in needed), needed


def test_the_argument_reference_of_the_readme_is_current():
    text = README.read_text(encoding="utf-8")
    assert renewed(text) == text, "run: python -m sidestep.config.readme"


def test_the_changelog_has_the_current_version():
    assert f"## {product_version()}" in (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
