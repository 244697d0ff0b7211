"""Tests lie where CONTRIBUTING says: in the folder of what they test."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent


def test_each_package_has_tests_under_its_name_and_each_folder_of_tests_a_package() -> None:
    packages, folders, files = set(), set(), set()
    for room in ("aim", "analysis", "harness", "sweeps"):
        packages |= {path.parent.relative_to(TESTS.parent) for path in (TESTS.parent / room).rglob("__init__.py")}
        for path in (TESTS / room).rglob("test_*.py"):
            place = path.relative_to(TESTS)
            files.add(place.with_name(path.stem.removeprefix("test_")))
            folders.add(place.parent)
    assert folders <= packages, "rename or move these folders of tests"
    above = {parent for folder in folders for parent in folder.parents}
    assert packages <= folders | above | files, "tests of a package lie in its folder, or in test_PACKAGE.py"
