"""Which methods answer which prompts, at which settings."""

from .bench import Bench, Point, Step, Task
from .methods import (
    GRID,
    GUIDED,
    args_step,
    base_step,
    best_of_step,
    guided_step,
    rollout_step,
    smc_step,
)
from .settings import FINAL, OBJECTIVES, SHARPENED, TEMPERATURES, TRIED, WEIGHTS

DPO = [objective for objective in OBJECTIVES if objective.startswith("dpo")]


def dev_steps(bench: Bench, task: Task) -> list[Step]:
    """Returns the steps of the wide grid: 16 settings per method; for DPO three training runs at 4 temperatures."""
    seeds, tried = task.size.dev_seeds, TRIED[task.name]
    steps = [base_step(bench, task, "dev", "base", [Point(0.0, x) for x in SHARPENED])]
    for name, (objective, reference) in GUIDED.items():
        if name in tried:
            steps += [guided_step(bench, task, "dev", name, objective, reference, seed, GRID) for seed in seeds]
    for objective in DPO:
        points = [Point(1.0, temperature) for temperature in TEMPERATURES]
        steps += [guided_step(bench, task, "dev", objective, objective, "base", seed, points) for seed in seeds]
    points = [Point(weight, temperature) for temperature in TEMPERATURES for weight in WEIGHTS]
    if "ARGS" in tried:
        steps.append(args_step(bench, task, "dev", seeds[0], points))
    return steps


def test_steps(bench: Bench, task: Task) -> list[Step]:
    """Returns the steps of the settings that were chosen, on prompts that no setting was chosen on."""
    size, final = task.size, FINAL[task.name]
    samples = base_step(bench, task, "test", "base", [Point(0.0)] * max(size.n_best_of))
    sharpened = base_step(bench, task, "test", "base, sharpened", [Point(0.0, x) for x in final["base, sharpened"]])
    steps = [samples, sharpened]
    for seed in size.seeds:
        for name, (objective, reference) in GUIDED.items():
            if name in final:
                points = [Point(*point) for point in final[name]]
                steps.append(guided_step(bench, task, "test", name, objective, reference, seed, points))
        for objective in final["DPO"]:
            steps.append(guided_step(bench, task, "test", objective, objective, "base", seed, [Point(1.0)]))
    # The slowest methods have fewer training runs.
    for seed in size.few_seeds:
        steps += [best_of_step(bench, task, "test", seed, samples, by) for by in final["best of n"]]
    if "SMC" in final:
        steps += [smc_step(bench, task, "test", seed, [Point(x) for x in final["SMC"]]) for seed in size.few_seeds]
    if "ARGS" in final:
        steps += [args_step(bench, task, "test", seed, [Point(*x) for x in final["ARGS"]]) for seed in size.few_seeds]
    if "Transfer-Q" in final:
        steps.append(rollout_step(bench, task, "test", size.seeds[0], [Point(final["Transfer-Q"])]))
    return steps
