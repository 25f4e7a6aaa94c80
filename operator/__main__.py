"""`python -m lanewise.operator`."""

from lanewise.operator.main import main

main()
