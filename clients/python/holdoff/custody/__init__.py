"""Grants in custody, for both clients: `holdoff.Client.grants` and its asyncio twin."""
