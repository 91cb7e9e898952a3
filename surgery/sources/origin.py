"""Where the files of a Hugging Face model are: in a local folder, in the Hub's cache, or on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import ModelFileError, RecipeError
from surgery.sources.configs import read_json

COMPANIONS = (
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "chat_template.jinja",
)
HUB_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class Origin:
    """A local folder or a model on the Hub.

    Args:
        name: The folder or the Hub id.
        is_local: It is a folder.
        is_offline: The Hub cannot be reached, so that only what was downloaded before can be had.
    """

    name: str
    is_local: bool
    is_offline: bool

    @classmethod
    def of(cls, path_or_id: str) -> Origin:
        """Tell which it is.

        Raises:
            RecipeError: There is no such folder.
        """
        if Path(path_or_id).is_dir():
            return cls(path_or_id, is_local=True, is_offline=True)
        if Path(path_or_id).exists() or path_or_id.count("/") > 1 or path_or_id.startswith((".", "/", "~")):
            raise RecipeError(
                f"{path_or_id}: there is no such folder", hint="give a folder with config.json and weights"
            )
        return cls(path_or_id, is_local=False, is_offline=not _hub_answers())

    def config(self) -> dict[str, Any]:
        """Return the content of `config.json`.

        Raises:
            RecipeError: There is no such model, or the Hub cannot be reached.
            ModelFileError: There is none, or it is not a JSON object.
        """
        path = self.find("config.json")
        if path is None:
            raise ModelFileError(
                f"{self.name}: there is no config.json", hint="give the folder that save_pretrained() wrote"
            )
        return read_json(path)

    def companions(self) -> dict[str, bytes | Path]:
        """Return the configs and the tokenizer by file name."""
        found = {name: self.find(name) for name in ("config.json", *COMPANIONS)}
        return {name: path for name, path in found.items() if path is not None}

    def find(self, name: str) -> Path | None:
        """Return where a file is, downloading it if need be, or None if the model has none of that name."""
        if self.is_local:
            path = Path(self.name, name)
            return path if path.is_file() else None
        return _find_on_hub(self.name, name, is_offline=self.is_offline)


def _hub_answers() -> bool:
    """Ask once. Left to itself, huggingface_hub 2.4 asks for every file six times, waiting 23 seconds in all."""
    try:
        from huggingface_hub import constants, get_session

        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_SECONDS)
    except Exception:
        return False
    return True


def _find_on_hub(repo: str, name: str, *, is_offline: bool) -> Path | None:
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise RecipeError(
            f"{repo}: there is no such folder, and the Hub needs huggingface_hub",
            hint="pip install 'graph-surgery[transformers]'",
        ) from error
    try:
        return Path(hf_hub_download(repo, name, local_files_only=is_offline))
    except errors.LocalEntryNotFoundError as error:
        if is_offline and name != "config.json":
            return None
        raise _unreachable(repo) from error
    except errors.EntryNotFoundError:
        return None
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise RecipeError(
            f"{repo}: neither a local folder nor a model on the Hub that may be read",
            hint="check the spelling; for a private or gated model run `hf auth login` first",
        ) from error
    except OSError as error:
        raise _unreachable(repo) from error


def _unreachable(repo: str) -> RecipeError:
    return RecipeError(
        f"{repo}: not a local folder, and the Hugging Face Hub cannot be reached",
        hint=f"on a machine with network run `hf download {repo} --local-dir FOLDER`, "
        "and give that folder as the source",
    )
