"""`python -m lanewise.prefill_worker`."""

from lanewise.prefill_worker.server import main

main()
