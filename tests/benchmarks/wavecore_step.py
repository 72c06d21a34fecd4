"""One step of the WaveCore seed in a session, beside the same step jitted by JAX.

    python tests/benchmarks/wavecore_step.py --peer-python PYTHON_WITH_JAX --threads 1 --clock cpu

Both sides keep the state between calls, read and write the memory, and hand back the action as a NumPy array.  Ours is
what a robot's loop calls, checks of the inputs included.  --check compares the outputs of twenty steps instead
(in one process, so the interpreter needs JAX).
"""

import functools
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.alternate import main  # noqa: E402

CASES = {"step, salient (writes)": 1.0, "step, not salient": 0.0}


def model():
    """The seed, with the same weights on both sides."""
    from xuramamba.wavecore import CoreModelConfig, inference_variables, make_core_model

    built, variables = make_core_model(0, 64, 7, 7, CoreModelConfig.seed())
    return built, inference_variables(variables)


def inputs():
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.standard_normal(64).astype(np.float32), rng.uniform(-1, 1, 7).astype(np.float32)


def past(steps=400):
    """Observations that fill every slot of the memory, so that a step costs the most it can."""
    import numpy as np

    return 3 * np.random.default_rng(1).standard_normal((steps, 64)).astype(np.float32)


# ---------------------------------------------------------------------- ours
def prepare_ours(threads):
    import xuracore as xc

    xc.set_num_threads(threads)


def ours(reward):
    from xuramamba.wavecore.session import InferenceRouter

    router, (obs, action) = InferenceRouter(*model()), inputs()
    for other in past():
        router.infer(other, action, 1.0)
    return lambda: router.infer(obs, action, reward)[0], None


# ---------------------------------------------------------------------- JAX
def prepare_jax(threads):
    try:
        import jax  # noqa: F401
    except ImportError:
        raise SystemExit("jax is missing: name an interpreter that has it with --peer-python") from None


def jax_step():
    """(jitted step, its first state): the gated core with tied writes, as xuramamba.wavecore defines it."""
    import jax
    import jax.numpy as jnp

    built, variables = model()
    c, tree = built.config, jax.tree_util.tree_map(jnp.asarray, variables["params"])

    def dense(t, x):
        return x @ t["kernel"] + t["bias"] if "bias" in t else x @ t["kernel"]

    def norm(t, x):
        x = (x - x.mean()) * jax.lax.rsqrt(x.var() + 1e-6)
        return x * t["scale"] + t["bias"]

    def mlp(t, x):
        return dense(t["out"], jax.nn.relu(norm(t["norm"], dense(t["in"], x))))

    def saturated(x):
        return c.state_saturation_limit * jnp.tanh(x / c.state_saturation_limit)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, obs, action, reward):
        s, w, p, memories, keys, usages = state
        t = tree["encoder"]
        parts = [mlp(t["obs"], obs), jax.nn.relu(dense(t["action"], action)), jax.nn.relu(dense(t["reward"], reward))]
        e = norm(t["norm"], mlp(t["fuse"], jnp.concatenate([*parts, jnp.zeros(c.d_e)])))
        query = mlp(tree["cms"]["query"], jnp.concatenate([s, e]))
        seen, attentions, used = [], [], [(k * k).sum(1) > 0 for k in keys]
        for i, (memory, key) in enumerate(zip(memories, keys)):
            logits = jnp.where(used[i], key @ query / c.d_k**0.5, -1e30)
            attention = jnp.where(used[i], jnp.exp(logits - logits.max()), 0)
            attentions.append(attention / jnp.maximum(attention.sum(), 1e-30))
            seen.append(attentions[-1] @ memory @ tree["cms"]["levels"][str(i)]["kernel"])
        mix = jax.nn.softmax(dense(tree["cms"]["mix"], jnp.concatenate(seen)))
        context = sum(mix[i] * u for i, u in enumerate(seen))
        t = tree["core"]
        z = dense(t["z"], e)
        gate = jax.nn.sigmoid(dense(t["gate"], jnp.concatenate([s, e, context])))
        p = saturated(p + mlp(t["particle"], jnp.concatenate([p, context])))
        new_s = s + gate * dense(t["u_p"], p)
        x, wave = jnp.concatenate([z, context]), t["wave"]
        u = dense(wave["in"], x)
        delta = jax.nn.softplus(dense(wave["dt"], u)) * c.mamba_dt_scale + c.mamba_dt_min
        a = -jax.nn.softplus(wave["a_raw"][:, 0])
        carry = jnp.exp(delta * a) * w + jnp.expm1(delta * a) / a * dense(wave["b"], u) * u * wave["b_base"][:, 0]
        y = dense(wave["k"], u) * wave["c_base"][:, 0] * carry + wave["d"] * u
        emitted = dense(wave["out"], y * jax.nn.sigmoid(dense(wave["gate"], x)))
        new_s = saturated(new_s + (1 - gate) * dense(t["u_w"], emitted))
        y = dense(tree["decoder"]["last"], jax.nn.relu(mlp(tree["decoder"], jnp.concatenate([new_s, context]))))
        unit = query / jnp.linalg.norm(query)
        opened = jax.nn.sigmoid((reward[0] - c.cms_salience_threshold) / c.cms_salience_temperature)
        opened = jnp.where(opened >= c.cms_write_threshold, opened, 0)
        after = [], [], []
        for i, (memory, key, usage) in enumerate(zip(memories, keys, usages)):
            similar = jnp.where(used[i], key @ unit, -1e30)
            j = jnp.where(similar.max() > c.cms_merge_similarity, similar.argmax(), usage.argmin())
            memory = memory * (1 - c.cms_decays[i])
            value = tree["cms"]["levels"][str(i)]["kernel"] @ e
            mixed = key[j] + opened * (unit - key[j])
            length = jnp.linalg.norm(mixed)
            after[0].append(memory.at[j].add(opened * (value - memory[j])))
            after[1].append(key.at[j].set(mixed / jnp.where(length == 0, 1, length)))
            after[2].append((usage * (1 - c.cms_usage_decay) + attentions[i]).at[j].add(opened))
        return jnp.tanh(y), (new_s, saturated(carry), p, *after)

    start = built.initial_state(1)
    return step, jax.tree_util.tree_map(lambda x: jnp.asarray(x[0]), tuple(start))


def peer(reward):
    import numpy as np

    (step, state), (obs, action) = jax_step(), inputs()
    kept, reward = [state], np.array([reward], np.float32)
    for other in past():
        kept[0] = step(kept[0], other, action, np.ones(1, np.float32))[1]

    def call():
        y, kept[0] = step(kept[0], obs, action, reward)
        return np.asarray(y)

    return call, None


def check():
    """Print the largest difference between both sides over twenty steps."""
    import numpy as np

    (one, _), (two, _) = ours(1.0), peer(1.0)
    differences = [float(np.abs(one() - two()).max()) for _ in range(20)]
    print(f"largest difference over 20 steps: {max(differences):.2e}")


def cases(make):
    return {label: functools.partial(make, reward) for label, reward in CASES.items()}


if __name__ == "__main__":
    if "--check" in sys.argv:
        check()
    else:
        main(__doc__, {"ours": (prepare_ours, cases(ours)), "jax": (prepare_jax, cases(peer))}, (1,))
