"""What can be told of Dockerfile and docker-compose.yml without building anything: that they fit each other, the
service's settings and the files here. `python -m deploy.container` builds and runs them."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.container.dockerfile import (
    DockerfileError,
    Instruction,
    context,
    environment,
    inherited,
    needed,
    parse,
)
from service.settings import read_settings
from tests.deploy.prometheus import ROOT, needs_prometheus, program

STAGES = parse((ROOT / "Dockerfile").read_text())
IMAGES = ("service", "service-cuda")


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return found


def one(image: str, name: str) -> Instruction:
    return next(one for one in reversed(inherited(STAGES, image)) if one.name == name)


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_the_service_without_rights(image: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    user = one(image, "USER").text
    assert user == "tilewave"
    assert any("useradd --uid 10001 " in i.text and user in i.text for i in inherited(STAGES, image))
    words = one(image, "ENTRYPOINT").words()
    assert words[:3] == ["python", "-m", "service"]
    variables = environment(inherited(STAGES, image))
    for name, value in variables.items():
        if name.startswith("TILEWAVE_"):
            monkeypatch.setenv(name, value)
    copies = [i.words() for i in inherited(STAGES, image) if i.name == "COPY"]
    assert [variables["TILEWAVE_MODELS"]] * 2 in copies
    monkeypatch.setenv("TILEWAVE_MODELS", str(tmp_path))  # there is no /models here
    settings = read_settings([*words[3:], "--authentication", "off"])
    assert settings.port == int(one(image, "EXPOSE").text)
    assert f"http://127.0.0.1:{settings.port}/v2/health/ready" in one(image, "HEALTHCHECK").text
    assert one(image, "VOLUME").text == variables["TILEWAVE_CACHE_DIR"]


def test_docker_build_without_a_target_makes_the_image_for_cpus() -> None:
    assert next(reversed(STAGES)) == "service"


def test_only_the_image_for_gpus_has_their_packages() -> None:
    def installed(image: str) -> str:
        return " ".join(i.text for stage in needed(STAGES, image) for i in stage.instructions if i.name == "RUN")

    assert "[cuda]" in installed("service-cuda")
    assert "[cuda]" not in installed("service") and "[load]" not in installed("service")


def test_the_context_has_what_the_build_needs_and_no_more() -> None:
    found = context(ROOT, (ROOT / ".dockerignore").read_text())
    names = {str(path) for path in found}
    assert {"pyproject.toml", "requirements.lock", "README.md", "LICENSE", "deploy/container/trim"} <= names
    assert {"engine/__init__.py", "service/__main__.py", "models/efficientnet-lite0/model.toml"} <= names
    assert {path.parts[0] for path in found if len(path.parts) > 1} == {
        "engine", "service", "models", "load_tests", "deploy",
    }  # fmt: skip
    assert not any(path.suffix in (".onnx", ".pyc", ".whl") for path in found)
    readme = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["readme"]
    assert readme in names


def test_every_service_is_hardened_and_listens_to_this_machine_only() -> None:
    for name, service in compose()["services"].items():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"] and "/tmp" in service["tmpfs"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name


def test_compose_builds_images_that_there_are_and_mounts_files_that_there_are() -> None:
    document = compose()
    volumes = set()
    for service in document["services"].values():
        assert set(service.get("depends_on", ())) <= set(document["services"])
        if "build" in service:
            assert service["build"]["target"] in STAGES
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).is_dir() and volume.endswith(":ro")
            else:
                volumes.add(source)
    assert volumes == set(document["volumes"])


def test_prometheus_and_grafana_find_what_they_look_for() -> None:
    document = compose()["services"]
    prometheus = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    (target,) = prometheus["scrape_configs"][0]["static_configs"][0]["targets"]
    name, port = target.split(":")
    for variant in ("cpu", "gpu"):
        assert name in document[variant]["networks"]["default"]["aliases"]
        assert document[variant]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert f"http://{target}" in document["load"]["command"]
    mounts = dict(volume.split(":")[:2] for volume in document["grafana"]["volumes"])
    for folder in (ROOT / "deploy" / "grafana" / "provisioning").iterdir():
        assert mounts[f"./deploy/grafana/provisioning/{folder.name}"] == f"/etc/grafana/provisioning/{folder.name}"
    provider = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/tilewave.yml").read_text())["providers"][
        0
    ]
    assert provider["options"]["path"] == mounts["./deploy/grafana/dashboards"]
    home = document["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / home.replace(mounts["./deploy/grafana/dashboards"], "deploy/grafana/dashboards")).is_file()
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    host, _, own = source["datasources"][0]["url"].removeprefix("http://").partition(":")
    assert host in document and document["prometheus"]["ports"] == [f"127.0.0.1:{own}:{own}"]


def test_images_of_others_are_pinned_and_get_nothing_from_elsewhere() -> None:
    document = compose()["services"]
    for name in ("prometheus", "grafana"):
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", document[name]["image"]), "a release, not a moving tag"
    settings = document["grafana"]["environment"]
    assert settings["GF_PLUGINS_PREINSTALL_DISABLED"] == "true"
    said_no = {name for name, value in settings.items() if value == "false"}
    assert {
        "GF_ANALYTICS_REPORTING_ENABLED",
        "GF_ANALYTICS_CHECK_FOR_UPDATES",
        "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES",
        "GF_NEWS_NEWS_FEED_ENABLED",
        "GF_PLUGINS_PREINSTALL_AUTO_UPDATE",
    } <= said_no


@needs_prometheus
def test_prometheus_knows_every_option_that_compose_gives_it() -> None:
    known = subprocess.run([str(program("prometheus")), "--help"], capture_output=True, text=True, check=False)
    options = [word.split("=")[0] for word in compose()["services"]["prometheus"]["command"]]
    assert len(options) > 3
    assert [option for option in options if f"{option}=" not in known.stdout + known.stderr] == []


def test_one_variant_is_started_by_default() -> None:
    (line,) = [line for line in (ROOT / ".env").read_text().splitlines() if not line.startswith("#")]
    assert line == "COMPOSE_PROFILES=cpu"
    profiles = {name: service.get("profiles") for name, service in compose()["services"].items()}
    assert profiles == {"cpu": ["cpu"], "gpu": ["gpu"], "load": ["load"], "prometheus": None, "grafana": None}


def test_the_documents_run_an_image_as_compose_does() -> None:
    """And mount nothing over the models that it has: those of a clone are not built."""
    text = (ROOT / "docs" / "operations.md").read_text()
    (command,) = re.findall(r"^docker run (.+?)\n```", text, re.MULTILINE | re.DOTALL)
    words = shlex.split(command.replace("\\\n", ""))
    service = compose()["services"]["cpu"]
    assert words[-1] == service["image"] and {"--read-only", "--init"} <= set(words)
    values = {name: [value for one, value in pairwise(words) if one == name] for name in words if name.startswith("-")}
    assert (values["--tmpfs"], values["--cap-drop"]) == (service["tmpfs"], service["cap_drop"])
    assert values["--security-opt"] == [one.removesuffix(":true") for one in service["security_opt"]]
    assert values["-p"] == service["ports"]
    assert values["-e"] == [f"{name}={value}" for name, value in service["environment"].items()]
    assert [volume.split(":")[1] for volume in values["-v"]] == [one.split(":")[1] for one in service["volumes"]]


def test_what_is_not_understood_of_a_dockerfile_is_an_error() -> None:
    for text in ("FROM a", "FROM a AS b\nADD x y", "RUN x"):
        with pytest.raises(DockerfileError):
            parse(text)
    with pytest.raises(DockerfileError):
        parse("FROM a AS b\nRUN --mount=type=secret,id=x true")["b"].instructions[0].caches()


def test_stages_come_after_what_they_are_made_of() -> None:
    stages = parse("FROM x AS a\nFROM a AS b\nFROM x AS c\nFROM a AS d\nCOPY --from=b /x /y\nRUN one \\\n  two # three")
    assert [stage.name for stage in needed(stages, "d")] == ["a", "b", "d"]
    assert stages["d"].instructions[1].text == "one   two # three"
    assert environment(parse("FROM x AS a\nENV PATH=/o:$PATH B='c d'")["a"].instructions)["B"] == "c d"
