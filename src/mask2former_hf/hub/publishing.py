"""Model, processor and card to the Hub, in one commit."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from .model_card import write_model_card
from .remote_code import save_with_code

_TRANSPORT = ("httpx", "httpx2", "httpcore", "requests", "urllib3")  # by version of huggingface_hub


def push_to_hub(
    model,
    processor,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload Mask2Former",
    with_code: bool = False,
    **card,
) -> str:
    """Publish a checkpoint with its processor and model card as one commit: either all of it appears, or nothing.

    (`model.push_to_hub` and `processor.push_to_hub` work as everywhere in transformers: a commit each, and a card
    without content.)

    Args:
        repo_id: "owner/name", or a name of one's own; created if it does not exist.
        private: of a new repository; by default what the owner's settings say.
        revision: branch to commit to, created if it does not exist; "main" by default.
        token: of the Hub; by default the one of `hf auth login`.
        with_code: `save_with_code` instead of a plain checkpoint.
        card: of `write_model_card`: dataset, metrics, training_arguments, license, base_model, parity.

    Returns:
        The commit's address.

    Raises:
        PermissionError: if there is no token, or it may not write there.
        ConnectionError: if the connection was lost; nothing was published then.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        if with_code:
            save_with_code(model, processor, folder)
        else:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        with _clear_errors(repo_id, api.endpoint):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            write_model_card(model, Path(folder), processor, repo_id=repo_id, with_code=with_code, **card)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
            )
    return commit.commit_url


@contextmanager
def _clear_errors(repo_id: str, endpoint: str) -> Iterator[None]:
    """Of a refusal and of a lost connection errors that say what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise PermissionError(
            f"repo_id={repo_id!r}: the Hub at {endpoint} does not let this token write there, or there is none. Log "
            "in with `hf auth login`, or pass token= with a token that may write"
        ) from error
    except Exception as error:
        if not _is_transport(error):
            raise
        raise ConnectionError(
            f"repo_id={repo_id!r}: the connection to {endpoint} was lost while uploading. Nothing was published: the "
            "repository is as it was before. Run it again; files that arrived are not sent twice"
        ) from error


def _is_transport(error: BaseException | None) -> bool:
    """Whether the network failed; huggingface_hub raises the HTTP library's errors, or a RuntimeError from one."""
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0] in _TRANSPORT:
            return True
        error = error.__cause__
    return False
