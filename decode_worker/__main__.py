"""`python -m lanewise.decode_worker`."""

from lanewise.decode_worker.server import main

main()
