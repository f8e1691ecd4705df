"""How the holder of a lease proves that a report is its own, without its secret.

Reports wait on disk, where the secret of a lease must not be.
"""

from __future__ import annotations

import hashlib
import hmac


def secret_hash(secret: str) -> str:
    """Return what a coordinator keeps of a lease's secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def lease_proof(hash_of_secret: str, event_id: str) -> str:
    """Return the proof that belongs to a lease and to one event, which proves nothing else."""
    return hmac.new(hash_of_secret.encode(), event_id.encode(), "sha256").hexdigest()
