"""`python -m lanewise.router`."""

from lanewise.early_stop import end_on_sigterm

end_on_sigterm()  # before the imports, which take seconds

from lanewise.router.main import main  # noqa: E402

main()
