"""Learning-rate schedules: pure functions of the step number.

Each factory returns ``schedule(step) -> rate``; step counts from 0.  A resumed run asks for the rate
of its step and replays nothing.
"""

import math

from xuracore.errors import ConfigError


def _checked(peak, warmup, total):
    if not peak >= 0 or warmup < 0 or total < 1 or warmup > total:
        raise ConfigError(
            f"schedule with peak {peak}, warmup {warmup}, total {total}: "
            "need peak ≥ 0, 0 ≤ warmup ≤ total, total ≥ 1"
        )


def constant(peak, warmup=0):
    """Linear warm-up over ``warmup`` steps, then ``peak`` for ever."""
    _checked(peak, warmup, max(warmup, 1))
    return lambda step: peak * min(1.0, step / warmup) if warmup else peak


def linear(peak, total, warmup=0, final=0.0):
    """Linear warm-up to ``peak``, then linear to ``final``·peak at step ``total``."""
    _checked(peak, warmup, total)

    def rate(step):
        if step < warmup:
            return peak * step / warmup
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return peak * (1 + (final - 1) * progress)

    return rate


def cosine(peak, total, warmup=0, final=0.0, cycles=0.5):
    """Linear warm-up to ``peak``, then a cosine down to ``final``·peak at step ``total``.

    ``cycles`` = ½ is one descent; with n + ½ the rate rises again in between (Loshchilov & Hutter
    2017, without restarts).  The wave runs on past ``total``, as in the published implementations.
    """
    _checked(peak, warmup, total)

    def rate(step):
        if step < warmup:
            return peak * step / warmup
        progress = (step - warmup) / max(1, total - warmup)
        wave = max(0.0, 0.5 * (1 + math.cos(2 * math.pi * cycles * progress)))
        return peak * (final + (1 - final) * wave)

    return rate


def warmup_stable_decay(peak, total, warmup=0, decay=None, final=0.0, shape="sqrt"):
    """Linear warm-up, constant, then a cooldown over the last ``decay`` steps (default: a fifth).

    The long constant part can be continued from any checkpoint before the cooldown (Hu et al. 2024).
    shape : "linear", or "sqrt" for 1 - √progress (Hägele et al. 2024).
    """
    decay = max(1, total // 5) if decay is None else decay
    _checked(peak, warmup, total)
    if shape not in ("linear", "sqrt") or decay < 1 or warmup + decay > total:
        raise ConfigError(
            f"shape={shape!r}, warmup={warmup}, decay={decay}, total={total}: shape is 'linear' or 'sqrt', "
            "and warm-up and decay must fit into the total"
        )

    def rate(step):
        if step < warmup:
            return peak * step / warmup
        progress = min(1.0, max(0.0, (step - (total - decay)) / decay))
        fall = math.sqrt(progress) if shape == "sqrt" else progress
        return peak * (final + (1 - final) * (1 - fall))

    return rate


wsd = warmup_stable_decay

BY_NAME = {"constant": constant, "linear": linear, "cosine": cosine, "wsd": warmup_stable_decay}


def by_name(name, peak, total, warmup=0, **settings):
    """The schedule called ``name``: "constant", "linear", "cosine" or "wsd"."""
    if name not in BY_NAME:
        raise ConfigError(f"unknown schedule {name!r}; known: {', '.join(BY_NAME)}")
    if name == "constant":
        return constant(peak, warmup, **settings)
    return BY_NAME[name](peak, total, warmup, **settings)
