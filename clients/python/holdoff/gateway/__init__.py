"""The HTTP proxy beside jobs: it gives their calls the access token of a token in custody.

`routing`, `headers`, `standins` and `answers` decide; `server` reads and writes.
"""
