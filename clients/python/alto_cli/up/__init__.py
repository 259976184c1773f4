"""`alto up`: the three services on this machine, started, watched, restarted when they die, and stopped.

`layout` says where everything lies, `supervisor` looks after the processes, `lock` keeps a second `alto up` away,
`screen` shows how they are, `command` is what the command line calls.
"""
