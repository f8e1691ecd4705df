"""The provider's numbers.

*official*: published by the provider. *field*: reported by users of its API.
"""

from __future__ import annotations

SECOND_MS = 1_000
MINUTE_MS = 60 * SECOND_MS
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS

REFRESH_INTERVAL_MS = 570 * SECOND_MS
"""Least time from the last byte of one access token to the next request (official)."""
ACCESS_TOKEN_LIFE_MS = 600 * SECOND_MS
"""Life of an access token (official)."""
AUTHORIZATION_CODE_LIFE_MS = 3 * MINUTE_MS
"""Life of an authorization code (field)."""
REFRESH_TOKEN_IDLE_MS = 30 * DAY_MS
"""Life of an unused refresh token where old ones are refused (official)."""
GRACE_MS = 30 * MINUTE_MS
"""How long a used refresh token is valid under the rotation `grace`: as at Xero (not confirmed)."""
TOKEN_CALLS_PER_DAY = 200
"""Token endpoint calls per key, user and day (official in 2021)."""
CALLS_PER_MINUTE = 60
"""API calls per app and company in a clock minute (official)."""
CALLS_PER_DAY = 5_000
"""API calls per app and company in a day (official)."""
ERRORS_PER_HOUR = 10
"""Errors per key, user, company and endpoint in an hour (official)."""
COUNTED_STATUSES = frozenset({400, 401, 403, 404})
"""Statuses that count as errors (official)."""
BLOCK_MS = HOUR_MS
"""Length of a key's first block (official)."""
PAGE_SIZE = 60
"""Entities in an answer; a link leads to the next ones (official)."""
BULK_PAGE_SIZE = 1_000
"""Entities in an answer of the bulk and sync endpoints (official)."""
XML_PAGE_SIZE = 100
"""Entities in an answer of the XML API (field)."""
