"""`lanewise bench`: load for any OpenAI or Lanewise endpoint, measured at the client.

`workload` says what is asked and when (pure); `targets` ask; `drive` keeps the schedule; `report` counts (pure);
`plot` draws; `command` is the command line. The definitions of every number are in docs/bench.md.
"""
