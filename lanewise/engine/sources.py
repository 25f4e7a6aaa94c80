"""Where a model's files are: turns a model URI into a local directory.

Owns: the URI forms (`builtin://fable`, `file:///dir`, a plain directory, `hf://owner/name`) and the one place where
the engine touches a network. Must not: read what the files say (model_config.py and checkpoint.py do).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlparse

from lanewise.errors import ConfigError

Progress = Callable[[str, int, int], None]
"""Called with (what is going on, units done, units in all); the last may grow while files are being listed."""

BUILTIN = "builtin://"
PARTIAL = ".lanewise-partial"  # in a folder that hub_files.py has not completed
HUB = "hf://"
HUB_PATTERNS = (
    "model*.safetensors",  # not consolidated.safetensors, the same weights once more
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*.jinja",
)


def resolve(uri: str, revision: str = "main", on_progress: Progress | None = None) -> Path:
    """The directory that holds the model, downloading it first for `hf://`."""
    if uri.startswith(HUB):
        return _download(uri.removeprefix(HUB), revision, on_progress)
    if uri.startswith(BUILTIN):
        name = uri.removeprefix(BUILTIN)
        models = Path(__file__).resolve().parent.parent / "models"
        if not name.isidentifier() or not (models / name).is_dir():
            raise ConfigError(f"no built-in model named {name!r}; there is builtin://fable")
        return _checked(models / name, uri)
    if uri.startswith("file://"):
        parsed = urlparse(uri)
        if parsed.netloc not in ("", "localhost"):
            raise ConfigError(f"{uri}: a file URI names this machine: write file:///directory")
        return _checked(Path(unquote(parsed.path)), uri)
    if "://" in uri:
        raise ConfigError(
            f"{uri}: unknown kind of model; use builtin://fable, file:///dir, a directory or hf://owner/name"
        )
    return _checked(Path(uri).expanduser(), uri)


def _checked(directory: Path, uri: str) -> Path:
    if not directory.is_dir():
        raise ConfigError(f"{uri}: {directory} is not a directory")
    if (directory / PARTIAL).exists():
        raise ConfigError(f"{uri}: {directory} is not downloaded completely yet")
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{uri}: {directory} has no config.json, so it is not a Hugging Face model directory")
    return directory.resolve()


def _download(repo: str, revision: str, on_progress: Progress | None) -> Path:
    """A snapshot from the hub. Interrupted downloads resume; a finished one needs no network any more."""
    if repo.count("/") != 1:
        raise ConfigError(f"hf://{repo}: write hf://owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        path = snapshot_download(
            repo, revision=revision, allow_patterns=list(HUB_PATTERNS), tqdm_class=_progress_bar(on_progress)
        )
    except GatedRepoError as error:
        raise ConfigError(f"hf://{repo} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(f"hf://{repo}: no such model on the hub, or HF_TOKEN may not read it") from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"hf://{repo}: no revision {revision!r}") from error
    except Exception as error:  # the edge of a foreign library: offline, no route, HF_HUB_OFFLINE, a full disk
        raise ConfigError(
            f"hf://{repo}: the hub cannot be reached and revision {revision!r} is not in the local cache. Download it "
            f"where there is a network (hf download {repo} --revision {revision}), then use HF_HOME or file:///dir "
            f"({type(error).__name__}: {error})"
        ) from error
    return _checked(Path(path), f"hf://{repo}")


def _progress_bar(on_progress: Progress | None) -> type | None:
    """A silent tqdm that reports bytes to `on_progress`; None keeps the hub's own bars."""
    if on_progress is None:
        return None
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    report = on_progress

    class Reporting(tqdm):  # type: ignore[misc, unused-ignore]
        def __init__(self, *args: object, **kwargs: object) -> None:
            kwargs.pop("name", None)
            kwargs["disable"] = False
            kwargs["file"] = _Nowhere()
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            if self.unit == "B":
                report("download", int(self.n), int(self.total or 0))
            return shown

    return Reporting


class _Nowhere:
    """A text sink: the bars are reported, not printed."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        return None
