"""The supervisor behind `lanewise up`, and the commands that talk to what it started.

`plan` decides which processes run with which cores and ports (pure); `machine` looks at the machine; `child` runs one
process and restarts it; `supervisor` runs them all; `state` is the file that `status` and `down` read.
"""
