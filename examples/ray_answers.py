"""
Answers a file of prompts with guidance on Ray Data: each worker of a Ray cluster has its own base and reward models.

    python -m examples.ray_answers --output outputs/ray_answers.jsonl  # about 10 minutes on 2 cores

The files are those of `hf-genarm generate`: each line of `--prompts` comes out with a `completion`, in the same order.
Each batch is saved as soon as it comes back, so that a run which was killed continues when it is started again.
"""

import argparse
import json
import sys
from importlib.util import find_spec
from typing import Any

from transformers import set_seed

from examples.small import fitting_adapter, output_file, sized
from hf_genarm.demo import demo_model
from hf_genarm.hub.reward_model import find_tokenizer
from hf_genarm.scripts.generate import answer, batches_by_length
from hf_genarm.scripts.guided_model import load_guided
from hf_genarm.scripts.prompts import completion_of, read_rows, token_ids
from hf_genarm.scripts.shards import Shards, digest
from hf_genarm.scripts.shared_arguments import GuidanceArguments


class Answerer:
    """Answers one batch of prompts at a time, with a base and reward models that are loaded once for each worker."""

    def __init__(self, guidance: GuidanceArguments, options: dict[str, Any]):
        base, self.processor = load_guided(guidance, announce=False)
        self.model, self.tokenizer, self.options = base.model, base.tokenizer, options

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        numbers, prompts = json.loads(row["numbers"]), json.loads(row["prompts"])
        set_seed(numbers[0])  # so that answers don't depend on the worker
        texts = answer(self.model, self.tokenizer, prompts, self.processor, self.options)
        return {"numbers": row["numbers"], "texts": json.dumps(texts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", nargs="+", default=["model_cards/arm-smollm2-135m-sentiment"], help="reward models")
    parser.add_argument("--alpha", nargs="+", type=float, help="strengths; as recommended if they are left out")
    parser.add_argument("--base", help="Hub id or folder; the demo model if it is left out")
    parser.add_argument("--prompts", default="examples/data/sentiment/dev.jsonl", help="JSONL file of prompts")
    parser.add_argument("--output", type=output_file, required=True, help="JSONL file of answers")
    parser.add_argument("--workers", type=int, default=2, help="each is an actor of Ray with a base")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=sized(48, 4))
    parser.add_argument("--limit", type=int, default=sized(None, 12), help="number of prompts")
    args = parser.parse_args()
    if find_spec("ray") is None:
        sys.exit('This example needs Ray: `pip install "ray[data]"`.')
    import ray

    guidance = GuidanceArguments(
        base=args.base or demo_model(), arm=[fitting_adapter(x) for x in args.arm], alpha=args.alpha
    )
    options = {"do_sample": False, "max_new_tokens": args.max_new_tokens}
    rows = read_rows(args.prompts, "prompt")[: args.limit]
    settings = {"arm": args.arm, "alpha": args.alpha, "base": args.base, **options, "prompts": digest(rows)}
    shards = Shards(str(args.output), settings | {"batch_size": args.batch_size}, 0)

    tokenizer = find_tokenizer(guidance.base)
    ids = [token_ids(tokenizer, row["prompt"]) for row in rows]
    done = shards.done()
    batches = [x for x in batches_by_length(ids, args.batch_size) if not done.issuperset(x)]
    print(f"Prompts: {len(rows)}, answered before: {len(done)}", flush=True)
    if batches:
        # Lists would come out of Arrow as arrays.
        items = [{"numbers": json.dumps(x), "prompts": json.dumps([rows[n]["prompt"] for n in x])} for x in batches]
        answers = ray.data.from_items(items, override_num_blocks=len(items)).map(
            Answerer,
            fn_constructor_args=(guidance, options),
            compute=ray.data.ActorPoolStrategy(size=args.workers),
            num_cpus=1,  # num_gpus=1 on GPUs
        )
        for row in answers.iter_rows():
            texts = zip(json.loads(row["numbers"]), json.loads(row["texts"]), strict=True)
            shards.add({n: completion_of(rows[n]["prompt"], text) for n, text in texts if n not in done})
    shards.merge(rows)
    print(f"The answers are in {args.output}.")


if __name__ == "__main__":
    main()
