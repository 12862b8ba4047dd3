"""The prose of the studies: what a text made here lacks to be theirs is said."""

import json

import pytest

from experiment_scripts import experiment_script


@pytest.fixture(scope="module")
def script():
    return experiment_script("texts.docstrings")


def test_the_record_is_of_the_packages_that_the_text_is_made_of(script):
    record = json.loads(script.RECORD.read_text())
    assert set(record["versions"]) <= set(script.PACKAGES)
    assert script.beside_the_record(record) == "the text of the committed studies"


def test_another_version_and_a_package_too_many_are_named(script):
    record = json.loads(script.RECORD.read_text())
    versions = record["versions"] | {"numpy": "1.0", "torch": "2.13.0", "httpx": "1.0"}
    said = script.beside_the_record(record | {"sha256": "0" * 64, "versions": versions})
    assert said.endswith(f"which need: numpy=={record['versions']['numpy']}, no httpx")


def test_docstrings_come_in_the_order_of_the_source_and_code_that_does_not_parse_has_none(script):
    assert list(script.docstrings('"""One."""\ndef f():\n    """Two."""\n')) == ["One.", "Two."]
    assert list(script.docstrings("def f(:")) == []
