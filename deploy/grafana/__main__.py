"""`python -m deploy.grafana`: write the dashboards anew."""

from deploy.grafana.build import FOLDER, dashboards

if __name__ == "__main__":
    for name, content in dashboards().items():
        (FOLDER / name).write_text(content)
        print(f"{FOLDER / name}: {len(content)} bytes")
