"""Where a model's files are: a local folder, or a Hugging Face hub id that is fetched on demand."""

from __future__ import annotations

from pathlib import Path

from jaxserve import bundled
from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.config import ModelOptions

_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_UNWANTED = ["consolidated*", "*/*"]  # the same weights again, in their authors' own layout


def model_folder(options: ModelOptions) -> Path:
    """The folder of the model that `options` name; without one, the bundled model's. Raises as `resolve` does."""
    return bundled.path() if options.model is None else resolve(options.model, options.revision)


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """The folder of `model`: itself where it is one, otherwise the hub's snapshot (cached by huggingface_hub).

    Raises CheckpointError where `model` is neither a folder nor a repository that can be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    name = str(model)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name} is not a folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{name!r} is no local folder, and could not be fetched from the Hugging Face hub: {reason}"
        ) from error
