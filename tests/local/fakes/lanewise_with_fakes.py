"""The `lanewise` command with fake router and workers."""

import sys

from lanewise.cli import main
from lanewise.local import commands, plan

plan.MODULES = {"router": "fake_router", "prefill": "fake_prefill", "decode": "fake_decode"}
commands.SELF = (sys.executable, __file__)
sys.exit(main())
