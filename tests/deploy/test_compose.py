"""docker-compose.yml against the Compose Specification, as the package compose-spec has it: no key that there is not,
and no value that cannot be read. Whether its parts fit each other, test_container.py looks."""

from __future__ import annotations

import pytest
import yaml

from tests.deploy.prometheus import ROOT

compose_spec = pytest.importorskip("compose_spec", reason="the package compose-spec (extra `test`) is not installed")
TEXT = (ROOT / "docker-compose.yml").read_text()


def check(text: str) -> None:
    """Raises ValueError where it is wrong."""
    document = yaml.safe_load(text)
    document["networks"] = {"default": {}}  # every project has it, whether it says so or not
    compose_spec.PyCompose.from_yaml(yaml.safe_dump(document)).validate()


def test_the_file_is_as_the_specification_asks() -> None:
    check(TEXT)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("read_only: true", "readonly: true"),
        ("condition: service_healthy", "condition: service_well"),
        ('"127.0.0.1:3000:3000"', '"127.0.0.1:three:3000"'),
        ("stop_grace_period: 30s", "stop_grace_period: 30x"),
        ("capabilities: [gpu]", "capability: [gpu]"),
        ("networks: {default:", "networks: {fault:"),
    ],
)
def test_what_the_specification_does_not_have_is_noticed(right: str, wrong: str) -> None:
    assert right in TEXT
    with pytest.raises(ValueError):
        check(TEXT.replace(right, wrong))
