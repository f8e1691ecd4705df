"""How the holder of a lease proves that a report is its own, without sending the secret.

Reports are stored on disk, where the secret of a lease must not be.
"""

from __future__ import annotations

import hashlib
import hmac


def secret_hash(secret: str) -> str:
    """Return the hash of a lease's secret that a coordinator keeps."""
    return hashlib.sha256(secret.encode()).hexdigest()


def lease_proof(hash_of_secret: str, event_id: str) -> str:
    """Return the proof for one lease and one event."""
    return hmac.new(hash_of_secret.encode(), event_id.encode(), "sha256").hexdigest()
