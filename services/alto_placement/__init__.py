"""Placement: which task trains on which node, by predicted durations, under leases with fencing epochs.

Read `state` for what is known, `lifecycle` for how it changes (a pure state machine), `engine` for the loops around it.
"""
