"""Grafana: provisioned dashboards, made by `python -m deploy.grafana` from the modules here, and their data source."""
