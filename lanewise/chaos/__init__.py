"""Seeded fault campaigns against a local service: `lanewise chaos`.

Owns: the draw of faults (plan.py), a service of its own (service.py), what is done to it (inject.py), the load whose
answers are checked (traffic.py), and the verdict (report.py).
Must not: import the engine or torch, touch a service that somebody else runs, or be imported by anything but the CLI.
"""
