"""The dashboards as Grafana reads them: a JSON file each, with an id for every panel. Used by `python -m
deploy.grafana`, and by the tests, which hold the files to what is made here."""

import json
from itertools import count
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana.kernels import kernels
from deploy.grafana.models import models
from deploy.grafana.service import service

FOLDER = Path(__file__).parent / "dashboards"
_SCHEMA_VERSION = 42  # of Grafana 13.2 (@grafana/schema); the package still writes 41, which Grafana would migrate


def dashboards() -> dict[str, str]:
    """File name → content."""
    made = {}
    for make in (service, models, kernels):
        board = make().build()
        board.schema_version = _SCHEMA_VERSION
        for number, panel in zip(count(1), board.panels or [], strict=False):
            panel.id_val = number
        made[f"{make.__name__}.json"] = json.dumps(board, cls=JSONEncoder, indent=1, sort_keys=True) + "\n"
    return made
