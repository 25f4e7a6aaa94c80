"""Which images and which rendering rules a service runs with, and when that changes.

Owns: the pin in status.runtime. A new operator leaves a service as it is until spec.runtime.version asks for more.
Must not: render or apply.
"""

from __future__ import annotations

from lanewise import __version__
from lanewise.errors import ConfigError
from lanewise.operator.plan import RENDERING
from lanewise.spec import LLMService
from lanewise.spec_status import RuntimeStatus

RENDERINGS: dict[str, int] = {"0.1.0": 1}
"""Released version -> its rendering rules. A release adds a line, never changes one."""
REPOSITORY = "ghcr.io/lanewise"


def default_images() -> tuple[str, str]:
    """(control, worker) as the chart has them by default."""
    return f"{REPOSITORY}/control:{__version__}", f"{REPOSITORY}/worker:{__version__}"


def own_runtime(control_image: str, worker_image: str) -> RuntimeStatus:
    """What this operator gives to new services."""
    return RuntimeStatus(
        version=__version__, rendering=RENDERING, control_image=control_image, worker_image=worker_image
    )


def choose_runtime(service: LLMService, pinned: RuntimeStatus | None, own: RuntimeStatus) -> RuntimeStatus:
    """The runtime to render with. ConfigError where the wished-for version is not known."""
    wished = service.spec.runtime.version
    if wished is None:
        return pinned or own
    if pinned is not None and wished == pinned.version:
        return pinned
    if wished == own.version:
        return own
    if wished not in RENDERINGS:
        known = ", ".join(sorted({*RENDERINGS, own.version}))
        raise ConfigError(f"spec.runtime.version: expected one of {known}, got {wished}")
    images = (retag(image, wished) for image in (own.control_image, own.worker_image))
    control, worker = images
    return RuntimeStatus(version=wished, rendering=RENDERINGS[wished], control_image=control, worker_image=worker)


def retag(image: str, version: str) -> str:
    """The same repository at another version; a digest belongs to one version only and is dropped."""
    name = image.partition("@")[0]
    head, slash, last = name.rpartition("/")
    return f"{head}{slash}{last.partition(':')[0]}:{version}"
