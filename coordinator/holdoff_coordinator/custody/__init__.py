"""Custody: keeps OAuth grants sealed, refreshes them once for all, and hands out access tokens.

Decisions (`answers`, `rules`) are pure; `sealing` knows the keys.
"""
