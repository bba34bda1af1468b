"""`python -m load_tests.unmetered`: the service without its metrics, to measure what those cost. Takes the arguments of
`python -m service`."""

import sys

from service.numbers import Distribution, Joint, Number


def _nothing(self: object, *_: float) -> None:
    return


def main() -> int:
    """Take the work out of every metric, then serve."""
    for kind, names in ((Number, ("inc", "dec")), (Distribution, ("observe",)), (Joint, ("observe",))):
        for name in names:
            setattr(kind, name, _nothing)
    from service.__main__ import main as serve

    return serve()


if __name__ == "__main__":
    sys.exit(main())
