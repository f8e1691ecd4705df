"""Settings for tests without I/O: how busy the machine is fails none of them."""

import pytest
from hypothesis import HealthCheck, settings

from holdoff.cli import params
from tests.harness import LONG

# How long an example takes says how busy the machine is, and nothing of the code.
settings.register_profile(
    "ours",
    deadline=None,
    max_examples=100 if LONG else 40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ours")


@pytest.fixture
def patient_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let completion wait for a slow coordinator, which a user who types would not."""
    monkeypatch.setattr(params, "_COMPLETION_SECONDS", 20.0)
