"""Simulated episodes of an arm with seven joints: reaching for a goal, and tracking a moving one.

Joints follow commands of at most ±1: q ← q + 0.1 u + noise, and now and then something pushes them.  The expert's
command is tanh(4 (goal - q)).  *Reach*: the goal is seen for the first three steps only, with reward 1.  *Track*: a
goal moving on a circle of its own frequency is seen every fourth step, with reward 1 when seen.  So the present
observation does not hold what the command needs: it has to be remembered.
"""

import numpy as np

from xuracore.io.strict_json import save_json

JOINTS = 7
KINDS = ("reach", "track")


def simulate(rng, kind="reach", length=64):
    """One episode as RLDS JSON data (a dict); kind is "reach" or "track"."""
    joints, goal = rng.uniform(-1, 1, JOINTS), rng.uniform(-1, 1, JOINTS)
    phase, speed = rng.uniform(0, 2 * np.pi, JOINTS), rng.uniform(0.05, 0.15)
    steps = []
    for t in range(length):
        if kind == "track":
            target, seen = 0.8 * np.sin(phase + speed * t), t % 4 == 0
        else:
            target, seen = goal, t < 3
        if rng.random() < 0.1:
            joints = joints + rng.normal(0, 0.4, JOINTS)
        joints = np.clip(joints, -1.5, 1.5)
        command = np.tanh(4 * (target - joints))
        steps.append({
            "timestamp": round(0.05 * t, 6),
            "observation": {
                "robot_state": {"joint_positions": _rounded(joints)},
                "goal": _rounded(target if seen else np.zeros(JOINTS)),
                "goal_seen": float(seen),
                "task": [float(kind == name) for name in KINDS],
            },
            "action": {"command": _rounded(command)},
            "reward": 1.0 if seen else 0.0,
            "is_terminal": t == length - 1,
        })
        joints = joints + 0.1 * command + rng.normal(0, 0.005, JOINTS)
    return {"steps": steps}


def _rounded(x):
    return [round(float(value), 5) for value in x]


def generate(folder, count, seed=0, length=64):
    """Write ``count`` episodes, reach and track in turns, as episode_00000.json …; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(count):
        path = folder / f"episode_{i:05d}.json"
        save_json(path, simulate(np.random.default_rng((seed, i)), KINDS[i % 2], length))
        paths.append(path)
    return paths
