"""Models that are shared on the Hugging Face hub: `hub:USER/REPO[@REVISION]`, kept in its library's own cache.

The library reads HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT. Of a repository only a safetensors file and a JSON
file are downloaded, and nothing in them is executed. Nothing here imports torch.
"""

from __future__ import annotations

import re
from pathlib import Path

from segcore import files
from segcore.checkpoints.download import endpoint, network_errors
from segcore.checkpoints.manifest import WEIGHTS
from segcore.config.record import SETTINGS
from segcore.errors import UserError

PREFIX = "hub:"
REMEDY = "check the name and the network; a private or gated one needs a token in HF_TOKEN"


def hub_offline() -> bool:
    """Return whether HF_HUB_OFFLINE forbids to ask the hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def is_repo(name: str) -> bool:
    """Return whether a text is USER/REPO, by the rules of the hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def hub_folder(name: str, *, offline: bool = False) -> Path:
    """Return the folder with the files of `hub:USER/REPO[@REVISION]`, downloading those that are absent.

    It has model.safetensors and, where the repository has one, config.json. A branch or tag, by default main, is looked
    up each time; without a network, its newest downloaded state is used. The SHA-256 that the hub states is verified
    each time. Raises UserError for another name, and for files that are absent, cannot be downloaded or are damaged.
    """
    repo, revision = _parts(name)
    # The settings come first: where the weights are there, it is known whether there are settings.
    settings = _file(repo, revision, SETTINGS, offline)
    weights = _file(repo, settings.parent.name if settings else revision, WEIGHTS, offline)
    assert weights is not None
    return weights.parent


def hub_settings(name: str, *, offline: bool = False) -> tuple[Path, str]:
    """Return the folder that has the settings of `hub:USER/REPO[@REVISION]`, without downloading its weights.

    The second value is the name of that commit, `hub:USER/REPO@COMMIT`: weights that belong to these settings, whatever
    is pushed in the meantime. Raises UserError as `hub_folder` does, and for a repository without settings.
    """
    repo, revision = _parts(name)
    settings = _file(repo, revision, SETTINGS, offline)
    if settings is None:
        if offline or hub_offline():
            hub_folder(name, offline=True)  # raises if nothing is there
        why = f"no such repository, one that needs a token in HF_TOKEN, or one without {SETTINGS}"
        raise UserError(f"{name}: {why}; for the last, name a configuration and then {name}")
    return settings.parent, f"{PREFIX}{repo}@{settings.parent.name}"


def _parts(name: str) -> tuple[str, str]:
    """Return the repository and the revision that a name stands for."""
    parts = re.fullmatch(rf"{PREFIX}([^@]*)(?:@(\w[\w./-]*))?", name)
    if not parts or not is_repo(parts[1]) or ".." in name:
        raise UserError(f"{name:.200}: write hub:USER/REPO, or hub:USER/REPO@REVISION with a branch, tag or commit")
    return parts[1], parts[2] or "main"


def _file(repo: str, revision: str, name: str, offline: bool) -> Path | None:
    """Return a file of a repository in the library's cache; None if the repository has no settings."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    url = hf_hub_url(repo, name, revision=revision, endpoint=endpoint())
    cached = try_to_load_from_cache(repo, name, revision=revision)
    found, cache = Path(cached) if isinstance(cached, str) else None, Path(constants.HF_HUB_CACHE)
    if offline or hub_offline() or (found and re.fullmatch("[0-9a-f]{40}", revision)):
        if found is None and name == WEIGHTS:
            raise UserError(f"{url}: not downloaded yet, and downloads are disabled; {cache} (HF_HOME) has no copy")
        return _checked(found)
    with (
        files.writing(cache, "free space or set HF_HOME to another folder"),
        network_errors(f"{url}: cannot be downloaded", REMEDY),
    ):
        try:
            etag = get_hf_file_metadata(url).etag or ""
        except Exception as error:  # differs between the library's versions
            answer = getattr(error, "response", None)
            if answer is None or answer.status_code >= 500:  # no network, no hub
                if found or isinstance(try_to_load_from_cache(repo, WEIGHTS, revision=revision), str):
                    return _checked(found)
            elif name == SETTINGS and answer.status_code == 404:
                return None
            raise
        path = Path(hf_hub_download(repo, name, revision=revision, endpoint=endpoint()))
        return _checked(path, etag)


def _checked(path: Path | None, etag: str = "") -> Path | None:
    """Return the file; raises UserError unless it has the SHA-256 which the hub stated: links there are named by it."""
    if path is not None:
        stated = etag or (path.readlink().name if path.is_symlink() else "")
        if re.fullmatch("[0-9a-f]{64}", stated) and (found := files.sha256(path)) != stated:
            raise UserError(f"{path}: its SHA-256 is {found}, not {stated} as stated; delete {path.resolve()}")
    return path


def files_below(repo: str, revision: str, folder: str, remedy: str) -> list[str]:
    """Return the paths of the files below a folder of a repository; raises UserError, which ends in the remedy."""
    from huggingface_hub import HfApi

    with network_errors(f"{endpoint()}/{repo}/tree/{revision}/{folder}: cannot be listed", remedy):
        found = HfApi(endpoint=endpoint()).model_info(repo, revision=revision, timeout=30).siblings or []
    return [item.rfilename for item in found if item.rfilename.startswith(f"{folder}/")]


def upload(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a folder as one commit to a repository, which is created if it is not there; return its address."""
    from huggingface_hub import HfApi

    if hub_offline():
        raise UserError(f"{repo}: not uploaded, as HF_HUB_OFFLINE is set; unset it, or use --dry-run")
    address = f"{endpoint()}/{repo}"
    with network_errors(
        f"{address}: not uploaded", "log in with a token that may write, in HF_TOKEN or by `hf auth login`"
    ):
        api = HfApi(endpoint=endpoint())
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:  # it was there before
            raise UserError(f"{address}: not uploaded, as it is public; make it private there, or leave out --private")
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Upload the model with segcore",
            delete_patterns=["images/*"],  # those of an earlier upload
        )
    return address
