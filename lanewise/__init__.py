"""Lanewise: LLM serving with prefill and decode on separate workers, scheduled by length.

This package is the import root. It holds the shared core; the component packages (`router`, `prefill_worker`,
`decode_worker`, `operator`, `kernels`) live at the top of the repository and are reached through symlinks here.
"""

__version__ = "0.1.0"
