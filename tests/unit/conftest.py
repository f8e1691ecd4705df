"""Settings for tests without I/O: how busy the machine is fails none of them."""

import pytest
from hypothesis import HealthCheck, settings

from holdoff.cli import params

# How long an example takes says how busy the machine is, and nothing of the code.
settings.register_profile("ours", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ours")


@pytest.fixture
def patient_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let completion wait for a slow coordinator, which a user who types would not."""
    monkeypatch.setattr(params, "_COMPLETION_SECONDS", 20.0)
