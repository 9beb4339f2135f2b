"""Upload unlearned models to the Hugging Face hub, into private repositories unless asked otherwise."""

from itertools import product
from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import HFValidationError, validate_repo_id

from dualoptim.config.args import UnlearnArgs
from dualoptim.config.waiting import waiting
from dualoptim.errors import InputError, reason


def repositories(args: UnlearnArgs) -> dict[tuple[str, float, str, int], str]:
    """Name the repository of every (losses, rate, split, task): the one that is given, or with several results one for each.

    `me/model` becomes `me/model-ME-GD-lr1e-05-task1`.
    """
    assert args.push_to_hub is not None
    results = list(product(args.forget_losses, args.rates, args.split, args.task_list))
    if len(results) == 1:
        return {results[0]: args.push_to_hub}
    names = {}
    for losses, rate, split, task in results:
        end = f"-{losses}-lr{rate:g}" + (f"-{split}" if len(args.split) > 1 else "") + f"-task{task}"
        names[losses, rate, split, task] = args.push_to_hub + end.replace("+", "-")
    return names


def check_push(args: UnlearnArgs) -> None:
    """Make sure that an upload can be tried at the end: that the hub answers, knows who asks, and takes these names.

    Raises:
        InputError: if uploads are switched off, nobody is logged in, or a repository cannot be written to.
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
    with waiting("asking the hub"):
        _ask_hub(args, args.push_to_hub)


def _ask_hub(args: UnlearnArgs, asked: str) -> None:
    """Ask the hub whether it would take the repositories of a run; one that is not there yet is made in the end.

    Raises:
        InputError: if not, or if it cannot be asked.
    """
    api = huggingface_hub.HfApi()
    later = "or drop the flag: `hf upload` sends a model later"
    try:
        user = api.whoami()
    except Exception as error:  # of the network, the hub and its client: all kinds
        remedy = "run `hf auth login`" if _status(error) in (401, 403) else "mend the connection"
        raise InputError(f"--push-to-hub {asked}: {api.endpoint} says no ({_why(error)}); {remedy}, {later}") from None
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise InputError(f"--push-to-hub {asked}: the token of {user['name']} may only read; give HF_TOKEN one that may write")
    owners = [user["name"], *(one["name"] for one in user.get("orgs", ()))]
    for name in repositories(args).values():
        owner = name.partition("/")[0]
        if "/" in name and owner.casefold() not in [one.casefold() for one in owners]:
            who = f"{user['name']} is logged in, and may write to {', '.join(owners)}"
            raise InputError(f"--push-to-hub {name}: {who}; give {owners[0]}/{name.partition('/')[2]}")
        whole = name if "/" in name else f"{user['name']}/{name}"  # as it is made; gpt2 alone is somebody else's
        if not args.hub_public and _is_public(api, whole):
            raise InputError(f"--push-to-hub {name}: it exists and is public; give --hub-public or another name")


def _is_public(api: huggingface_hub.HfApi, name: str) -> bool:
    try:
        return not api.model_info(name).private
    except Exception:  # it is not there, above all
        return False


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _why(error: Exception) -> str:
    return "; ".join(dict.fromkeys(reason(part) for part in (error, error.__cause__) if part))


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
        private = "" if public else "--private "
        return (
            f"--push-to-hub {repository}: upload failed ({_why(error)}); the model is in {folder}, and "
            f"`hf upload {private}{repository} {folder}` sends it"
        )
    return f"uploaded to {api.endpoint}/{repo_id} ({'public' if public else 'private'})"
