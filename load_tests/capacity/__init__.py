"""How much a server can do, and where the time goes then: what `make load` runs and writes.

`drive.py` puts locust's users (load_tests/locustfile.py) on a server, more and more of them; `scrape.py` reads /metrics
before and after each stage; `saturation.py` finds the point from which more users only wait; `charts.py`, `document.py`
and `report.py` write what was seen. `__main__.py` is the command.
"""
