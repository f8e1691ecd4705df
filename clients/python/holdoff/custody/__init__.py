"""Grants in custody and their access tokens, for both clients: `holdoff.Client` and its twin."""
