"""
Publishes the reward models of this folder on the Hub, and a collection of them.

    python -m model_cards.upload --namespace my-name --dry-run     # lists what it would do, without network
    python -m model_cards.upload --namespace my-name               # needs a token: `hf auth login`

Cards are published with the names that the models have on the Hub. What is there already is updated.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError

from hf_genarm.scripts.publish import upload, write_upload

HERE = Path(__file__).parent
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "genarm_config.json"}


def folder_as_published(name: str, namespace: str, parent: Path) -> Path:
    """
    Returns a copy whose card has the name on the Hub.

    Raises:
        ValueError: if a file is missing, or the card has no results or no licence.
    """
    if missing := FILES - {path.name for path in (HERE / name).iterdir()}:
        raise ValueError(f"`{HERE / name}` lacks {', '.join(sorted(missing))}. Make it again, by `make_*.py`.")
    card = write_upload(HERE / name, parent / name, f"{namespace}/{name}")
    if not card.data.eval_results:
        raise ValueError(f"The card of `{name}` has no results. Make it again, by `make_*.py`.")
    return parent / name


def publish(namespace: str, is_dry_run: bool) -> None:
    """Publishes all reward models of the collection, or prints what would be published."""
    collection = json.loads((HERE / "collection.json").read_text(encoding="utf-8"))
    notes, api = collection.pop("notes"), HfApi()
    with tempfile.TemporaryDirectory() as parent:
        folders = {name: folder_as_published(name, namespace, Path(parent)) for name in notes}
        if is_dry_run:
            for name, folder in folders.items():
                size = sum(path.stat().st_size for path in folder.iterdir())
                print(f"{namespace}/{name}: {len(list(folder.iterdir()))} files, {size / 2**20:.1f} MB")
            print(f"Collection {collection['title']!r} of {len(notes)} models. Nothing was published.")
            return
        for folder in folders.values():
            ModelCard.load(folder / "README.md").validate()
        shelf = api.create_collection(namespace=namespace, exists_ok=True, **collection)
        for name, folder in folders.items():
            print(upload(folder, f"{namespace}/{name}"))
            api.add_collection_item(shelf.slug, f"{namespace}/{name}", "model", note=notes[name], exists_ok=True)
        print(shelf.url)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--namespace", required=True, help="user or organisation")
    parser.add_argument("--dry-run", action="store_true", help="print what would be published")
    args = parser.parse_args()
    if not args.dry_run and get_token() is None:
        sys.exit("upload: there is no token to publish with. Log in by `hf auth login`, or set `HF_TOKEN`.")
    try:
        publish(args.namespace, args.dry_run)
    except (HfHubHTTPError, ValueError) as error:
        sys.exit(f"upload: {error}")


if __name__ == "__main__":
    main()
