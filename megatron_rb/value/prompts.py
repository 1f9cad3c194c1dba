"""The question of a hop sample: eight labelled pictures, the rules of judging, the form of the answer."""

from __future__ import annotations

IMAGE = "<image>"
SLOTS = (
    "REF-START front",
    "REF-END front",
    "BEFORE front",
    "BEFORE left wrist",
    "BEFORE right wrist",
    "AFTER front",
    "AFTER left wrist",
    "AFTER right wrist",
)
"""Order of the pictures (Robo-Dopamine's released samples); fixed, so a dropped picture is replaced by a blank one."""

_RULES = """\
You are a strict and neutral judge of how far a robot has come with its task. Judge by the pictures alone.

<Task>{instruction}</Task>

The reference pair shows one run of this task at its start (0 % done) and at its end (100 % done):
{references}

The two moments to compare:
{moments}

How the score is scaled:
- Look at BEFORE and AFTER against the reference pair first and estimate how much of the task is done in each.
- Positive when AFTER is nearer to the goal: the share of what was left at BEFORE that has now been done.
- Negative when AFTER is further away: the share of what had been done at BEFORE that has now been undone.
- Zero when nothing that matters for the task has changed.

What to judge by:
1. Only changes that serve or harm this task count.
2. A sub-task that is complete counts more than a movement towards it.
3. Use every view; where a wrist view shows contact or grasp clearly, it outweighs the front view.
4. Ignore light, shadows, camera noise and background.
5. When the pictures do not decide it, answer zero.

Answer with one line and nothing else:
<score>+NN%</score> or <score>-NN%</score> or <score>0%</score>"""


def hop_prompt(instruction: str, slots: tuple[str, ...] = SLOTS) -> str:
    """The question with one `<image>` per slot.

    Args:
        slots: names of the pictures in the order in which they are shown.
    """
    lines = [f"{slot}: {IMAGE}" for slot in slots]
    return _RULES.format(instruction=instruction, references="\n".join(lines[:2]), moments="\n".join(lines[2:]))
