"""
Uploads a reward model to the Hub.

    hf-genarm publish my-arm user/my-arm --dry_run     # lists what would be uploaded
    hf-genarm publish my-arm user/my-arm               # needs a token: `hf auth login`

What is uploaded are the weights in safetensors, their configuration, the tokenizer, the card with its pictures, and
`custom_generate`. Checkpoints, optimisers, logs and pickles stay here. In the copy that is uploaded, the card has the
name that the reward model has on the Hub, and a licence: the one of `--license`, of the card, or of the base. The Hub
checks the metadata of the card before anything is uploaded.
"""

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, get_token

from ..demo import DEMO_MODEL_ID, hub_id
from ..hub.card import TAGS, reward_model_card, write_custom_generate
from ..hub.info import HUB_ID, INFO_NAME, RewardInfo
from ..hub.loading import ADAPTER_CONFIG, base_of
from .arguments import PublishArguments

_FILES = (
    "README.md",
    INFO_NAME,
    ADAPTER_CONFIG,
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "*token*.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "*.jinja",
    "*.png",
    "custom_generate/*",
)
_INDEX = "https://huggingface.co/models?other=genarm"


def main(args: PublishArguments) -> None:
    if not HUB_ID.fullmatch(args.repo_id):
        raise ValueError(f"`repo_id` is `{args.repo_id}`, but must be an id of the Hub: `user/name`.")
    if not args.dry_run and get_token() is None:
        raise ValueError("There is no token to publish with. Log in by `hf auth login`, or set `HF_TOKEN`.")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "upload")
        card: Any = write_upload(Path(args.arm), folder, args.repo_id, args.base, args.license)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            print(f"  {path.relative_to(folder)}  {path.stat().st_size / 2**20:.2f} MB")
        left = sorted(path.name for path in Path(args.arm).iterdir() if not (folder / path.name).exists())
        if left:
            print(f"Not uploaded: {', '.join(left)}")
        print(f"Licence: {card.data.license}. Base: {card.data.base_model or 'not named'}.")
        try:
            card.validate()
        except ValueError:
            raise
        except Exception as error:  # of the HTTP client, which differs from version to version of huggingface_hub
            if not args.dry_run:
                raise
            print(f"The card was not checked, because the Hub can't be reached: {error}")
        if args.dry_run:
            print(f"This would be {args.repo_id}. Nothing was published.")
            return
        print(upload(folder, args.repo_id, args.private))
    print(f"Reward models for hf_genarm are listed at {_INDEX}")


def write_upload(
    arm: Path, folder: Path, repo_id: str, base: str | None = None, license: str | None = None
) -> ModelCard:
    """
    Copies what is published of a reward model, and names it there as on the Hub.

    Args:
        arm (`Path`):
            Its folder.
        folder (`Path`):
            The new folder to write.
        repo_id (`str`):
            Its id on the Hub.
        base (`str`, *optional*):
            Hub id of the base, for an adapter that names a folder.
        license (`str`, *optional*):
            Identifier of the licence. Defaults to that of the card, or else of the base.

    Returns:
        [`~huggingface_hub.ModelCard`]: the card that was written.

    Raises:
        ValueError: if it is no reward model with weights in safetensors, or its base or licence is not known.
    """
    if not any(arm.glob("*.safetensors")):
        raise ValueError(f"`{arm}` has no weights in safetensors. Name the folder of a reward model, such as `my-arm`.")
    for path in sorted({path for pattern in _FILES for path in arm.glob(pattern)}):
        copy = folder / path.relative_to(arm)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    has_info, is_adapter = (folder / INFO_NAME).exists(), (folder / ADAPTER_CONFIG).exists()
    info = RewardInfo.load(folder / INFO_NAME) if has_info else RewardInfo()
    if is_adapter:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        info.base_model = config["base_model_name_or_path"] = _public_base(base or base_of(str(folder)), arm)
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if has_info:
        info.save(folder)
    card = _card(folder, info, repo_id, is_adapter)
    _add_license(card, license)
    card.save(folder / "README.md")
    if (folder / "custom_generate").exists():
        write_custom_generate(folder, repo_id)
    return card


def upload(folder: Path, repo_id: str, private: bool = False) -> str:
    """Uploads a folder into a repository, which is made if there is none; returns its address."""
    api = HfApi()
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message="Upload reward model")
    return str(repo)


def _public_base(named: str | None, arm: Path) -> str:
    known = hub_id(named)
    if known is None:
        raise ValueError(
            f"`{arm}` is an adapter on `{named}`, a folder of this machine, so that it can't be loaded elsewhere. Give "
            "the Hub id of that model: `--base`."
        )
    return known


def _card(folder: Path, info: RewardInfo, repo_id: str, is_adapter: bool) -> ModelCard:
    """Returns the card with the names of the Hub, or a new one if there is none."""
    name = repo_id.split("/")[1]
    if not (folder / "README.md").exists():
        return reward_model_card(info, name, repo_id, is_adapter)
    card: Any = ModelCard.load(folder / "README.md")
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *TAGS]))
    if info.base_model is not None:
        card.data.base_model = info.base_model
        card.data.base_model_relation = "adapter" if is_adapter else card.data.base_model_relation
        card.text = card.text.replace("<the model to be steered>", info.base_model)
    card.text = re.sub(r'(?<=GenARMLogitsProcessor\.from_pretrained\()"[^"]*"', json.dumps(repo_id), card.text)
    card.text = card.text.replace(f"# {card.data.model_name}\n", f"# {name}\n", 1)
    card.data.model_name = name
    return card


def _add_license(card: Any, license: str | None) -> None:
    """
    Adds the licence to the metadata of a card that has none.

    Raises:
        ValueError: if none is known.
    """
    if license is not None:
        card.data.license = license
    if card.data.license is None and card.data.base_model is not None:
        for name, value in _license_of(card.data.base_model).items():
            card.data[name] = value
    if card.data.license is None and sys.stdin.isatty():
        card.data.license = input("Licence, such as apache-2.0: ").strip() or None
    if card.data.license is None:
        raise ValueError(
            "Neither the card nor the base names a `license`. Choose one, such as `--license apache-2.0`; "
            "https://huggingface.co/docs/hub/repositories-licenses lists the identifiers."
        )


def _license_of(base: str) -> dict[str, str]:
    """Returns what the card of a base says about its licence; nothing if the Hub can't be reached."""
    if base == DEMO_MODEL_ID:
        return {"license": "apache-2.0"}
    try:
        data = ModelCard.load(base).data.to_dict()
    except Exception:  # of the HTTP client, as above
        return {}
    return {name: data[name] for name in ("license", "license_name", "license_link") if name in data}
