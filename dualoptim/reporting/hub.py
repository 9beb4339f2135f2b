"""Upload unlearned models to the Hugging Face hub, into private repositories unless asked otherwise."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import HFValidationError, validate_repo_id

from dualoptim.config.args import UnlearnArgs
from dualoptim.errors import InputError, reason


def repositories(args: UnlearnArgs) -> dict[tuple[str, float, int], str]:
    """Name the repository of every (losses, rate, task): the one that is given, or with several results one for each.

    `me/model` becomes `me/model-ME-GD-lr1e-05-task1`.
    """
    assert args.push_to_hub is not None
    results = [(losses, rate, task) for losses in args.forget_losses for rate in args.rates for task in args.task_list]
    if len(results) == 1:
        return {results[0]: args.push_to_hub}
    return {
        (losses, rate, task): args.push_to_hub + f"-{losses}-lr{rate:g}-task{task}".replace("+", "-")
        for losses, rate, task in results
    }


def check_push(args: UnlearnArgs) -> None:
    """Make sure that an upload can be tried at the end, without asking the hub.

    Raises:
        InputError: if there is no token, uploads are switched off, or the name of a repository is none.
    """
    if args.push_to_hub is None:
        return
    for name in repositories(args).values():
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise InputError(f"--push-to-hub {name}: {reason(error)}; give a shorter or other name, such as me/model") from None
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise InputError(f"--push-to-hub {args.push_to_hub}: HF_HUB_OFFLINE is set, which forbids uploads; unset it")
    if not huggingface_hub.get_token():
        raise InputError(
            f"--push-to-hub {args.push_to_hub}: nobody is logged in to the hub; run `hf auth login`, or set HF_TOKEN"
        )


def push(folder: Path, repository: str, public: bool) -> str:
    """Upload a saved model, and say in one line where it is, or why it is not there: the result stays on disk either way.

    A new repository is private unless `public`; one that is there already keeps its visibility, and nothing is uploaded to a
    public one that was not asked for.
    """
    api = huggingface_hub.HfApi()
    try:
        repo_id = api.create_repo(repository, private=not public, exist_ok=True).repo_id
        if not public and not api.model_info(repo_id).private:
            return f"--push-to-hub {repo_id}: it exists and is public; nothing was uploaded. Give --hub-public or another name"
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="A model unlearned with dualoptim")
    except Exception as error:  # of the network, the hub and its client: all kinds
        why = "; ".join(reason(part) for part in (error, error.__cause__) if part)
        return (
            f"--push-to-hub {repository}: upload failed ({why}); the model is in {folder}, and "
            f"`hf upload {repository} {folder}` sends it"
        )
    return f"uploaded to {api.endpoint}/{repo_id} ({'public' if public else 'private'})"
