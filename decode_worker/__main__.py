"""`python -m lanewise.decode_worker`."""

from lanewise.early_stop import end_on_sigterm

end_on_sigterm()  # before the imports, which take seconds

from lanewise.decode_worker.server import main  # noqa: E402

main()
