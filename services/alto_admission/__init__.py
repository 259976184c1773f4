"""Admission: the public API. It admits tuning tasks, keeps their story, and hands out their adapters.

`domain` says what may happen (plain Python), `store` keeps it (all SQL), `servicer` and its neighbours speak gRPC, and
`server` wires them together with the two loops that talk to placement: `dispatcher` (down) and `plan_watcher` (up).
"""
