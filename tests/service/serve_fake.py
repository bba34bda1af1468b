"""`python -m service` with the fake engine: for tests of the real process (signals, exit status, settings)."""

import sys

from service.__main__ import serve
from service.settings import SettingsError, read_settings
from tests.service.fakes import FakeEngine

if __name__ == "__main__":
    try:
        sys.exit(serve(read_settings(sys.argv[1:]), FakeEngine))
    except SettingsError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
