"""Settings of tests that compile many small programs."""

from tests.ptq.conftest import cheap_programs

__all__ = ["cheap_programs"]
