"""`python -m lanewise.router`."""

from lanewise.router.main import main

main()
