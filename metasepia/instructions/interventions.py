"""Is a cluster the cause of the answer? The state that closes the instruction is moved to another task's centroid.

If the answer is then the other task's, the model reads its task there and by where the state lies. Without the
bottleneck mask later tokens can read the instruction again, and few answers follow; under `reread` the closing token
can, in the blocks after the patched one, from which `hold` keeps it.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metasepia.instructions.tasks import INSTRUCTION_END
from metasepia.stacked.decoder import Edit

Patch = Literal["replace", "hold", "add", "shuffled", "own"]
PATCHES: tuple[Patch, ...] = ("replace", "hold", "add", "shuffled", "own")
"""`replace`: the other task's centroid stands in place of the state of one layer; `hold`: in that layer and all after
it, each layer's own centroid; `add`: the difference of both centroids is added to the state of one layer. Controls, of
one layer: `shuffled`, replaced by the other's centroid under shuffled labels, and `own`, by its own task's centroid."""


def centroids(
    states: Float[Tensor, "models batch width"], task: Int[Tensor, "models batch"], num_tasks: int
) -> Float[Tensor, "models tasks width"]:
    """Mean state of each task; zero for a task that does not occur."""
    member = torch.nn.functional.one_hot(task, num_tasks).to(states.dtype)
    return member.transpose(1, 2) @ states / member.sum(1).clamp(min=1)[..., None]


def move(
    layer: int,
    patch: Patch,
    means: Float[Tensor, "layers models tasks width"],
    task: Int[Tensor, "models batch"],
    target: Int[Tensor, "models batch"],
    position: int = INSTRUCTION_END,
) -> Edit:
    """An edit for the decoder's forward: moves states at one position towards `target`'s centroid in `means`.

    `means` of `shuffled` are centroids under shuffled labels. Other layers and positions pass unchanged.
    """
    model = torch.arange(means.shape[1], device=means.device)[:, None]

    def edit(at: int, states: Tensor) -> Tensor:
        if at != layer and not (patch == "hold" and at > layer):
            return states
        goal = means[at, model, task if patch == "own" else target]
        states = states.clone()
        if patch == "add":
            states[:, :, position] += goal - means[at, model, task]
        else:
            states[:, :, position] = goal
        return states

    return edit


def other_tasks(task: Int[Tensor, "batch"], shift: Int[Tensor, "batch"], num_tasks: int) -> Int[Tensor, "batch"]:
    """A task that is not a sequence's own: `shift`, 0 to num_tasks - 2, says which."""
    return (task + 1 + shift) % num_tasks
