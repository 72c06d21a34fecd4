"""What any model has to beat: repeating the last action, the mean action, and a linear map."""

import numpy as np

from training.wavecore.episodes import inputs_of


def _rows(episodes):
    batches = [inputs_of(episode) for episode in episodes]
    x = np.concatenate([np.concatenate([b.obs[0], b.previous[0], b.rewards[0]], axis=1) for b in batches])
    y = np.concatenate([b.target[0] for b in batches])
    previous = np.concatenate([b.previous[0] for b in batches])
    return np.concatenate([x, np.ones((len(x), 1))], axis=1).astype(np.float64), y.astype(np.float64), previous


def losses(train, held, ridge=1e-3):
    """{"persistence_loss", "mean_action_loss", "linear_loss"}: mean squared errors on held-out episodes.

    The linear map sees what the model sees of one step: observation, previous action, previous reward.
    """
    x, y, _ = _rows(train)
    held_x, held_y, previous = _rows(held)
    solution = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y)
    guesses = {"persistence_loss": previous, "mean_action_loss": y.mean(axis=0), "linear_loss": held_x @ solution}
    return {name: float(np.mean((guess - held_y) ** 2)) for name, guess in guesses.items()}
