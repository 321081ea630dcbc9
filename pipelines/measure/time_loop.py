"""Time a step without its network, in milliseconds, against diffusers' schedulers.

    python pipelines/measure/time_loop.py

Latents are 16 x 16 x 4; the network returns what it is given. The least of five runs of 100 steps.
"""

import argparse
import time
from collections.abc import Callable

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from latentdiff import solvers
from latentdiff.diffusion import process, timetable
from latentdiff.diffusion.denoiser import Estimate
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.sampling import sample

THEIRS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "lms": LMSDiscreteScheduler,
    "dpmpp-2m": DPMSolverMultistepScheduler,
    "deis": DEISMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
STEPS = 100


def least(run: Callable[[], object]) -> float:
    """Milliseconds a step."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * min(times) / STEPS


@torch.no_grad()
def main() -> None:
    argparse.ArgumentParser(description="Time the loop without a network.").parse_args()
    where, noise = process.create("vp-scaled-linear"), NoiseStreams(0)
    levels, x = timetable.create("karras", where, STEPS), noise.draw((4, 16, 16))
    print("| solver | latentdiff, ms a step | diffusers |\n|---|---|---|")
    for name, kind in THEIRS.items():
        solver, scheduler = solvers.create(name, where), kind()

        def ours(solver: solvers.Solver = solver) -> None:
            sample(lambda x, level: Estimate(x), solver, levels, x, noise=noise)

        def theirs(scheduler=scheduler) -> None:
            scheduler.set_timesteps(STEPS)
            held = x
            for t in scheduler.timesteps:
                seen = scheduler.scale_model_input(held, t)
                held = scheduler.step(seen, t, held).prev_sample

        print(f"| `{name}` | {least(ours):.3f} | {least(theirs):.3f} |")


if __name__ == "__main__":
    main()
