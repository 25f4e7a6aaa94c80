"""`python -m lanewise.prefill_worker`."""

from lanewise.early_stop import end_on_sigterm

end_on_sigterm()  # before the imports, which take seconds

from lanewise.prefill_worker.server import main  # noqa: E402

main()
