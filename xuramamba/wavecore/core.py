"""The recurrent core: fast state s, wave carry w and particle p, from the encoded input e and the context c.

Gated form (``core="gated"``), with g = σ(W [s; e; c]) and z = W e::

    w' , w_out = wave(w, [z; c])
    p' = sat(p + MLP([p; c]))                  (with particle_input, MLP([p; z; c]))
    s' = sat(s + g ⊙ U_p p' + (1 - g) ⊙ U_w w_out)

Seed form (``core="seed"``)::

    s' = σ(W [s; e; c])      w', w_out = wave(w, e)      p' = tanh(W [p; e; s'])

and the decoder then sees s' + U_w w_out + U_p p', without which wave and particle would reach no output.
sat keeps s, w and p within ± the limit of the configuration; softly, so that a large state still has a gradient.
"""

from xuracore import ops
from xuracore.nn import Parameter, init
from xuramamba.wavecore.parameters import dense, mlp, new_dense, new_mlp
from xuramamba.wavecore.wave import new_wave, wave_step


def new_core(rng, c):
    """Parameters of :func:`core_step`."""
    def mix(inputs):
        return {"kernel": Parameter(init.xavier_uniform((inputs, c.d_s), rng))}

    if c.core == "seed":
        return {
            "fast": new_dense(rng, c.d_s + c.d_e + c.d_c, c.d_s),
            "wave": new_wave(rng, c, c.d_e),
            "particle": new_dense(rng, c.d_p + c.d_e + c.d_s, c.d_p),
            "u_p": mix(c.d_p),
            "u_w": mix(c.d_w),
        }
    seen = c.d_p + c.d_c + (c.d_p if c.particle_input else 0)
    return {
        "z": new_dense(rng, c.d_e, c.d_p),
        "wave": new_wave(rng, c, c.d_p + c.d_c),
        "particle": new_mlp(rng, seen, c.d_p + c.d_c, c.d_p, c.use_layer_norm),
        "gate": new_dense(rng, c.d_s + c.d_e + c.d_c, c.d_s),
        "u_p": mix(c.d_p),
        "u_w": mix(c.d_w),
    }


def saturate(x, config):
    """x within ± state_saturation_limit."""
    limit = config.state_saturation_limit
    if config.saturation == "hard":
        return ops.clip(x, -limit, limit)
    return ops.tanh(x * (1 / limit)) * limit


def core_step(params, config, s, w, p, e, c, ablate=()):
    """(what the decoder sees (B, d_s), s (B, d_s), w (B, d_w), p (B, d_p)) after one step.

    ablate : parts to silence, of "wave" and "particle": their state stays and they give nothing.
    """
    wave, particle = config.use_mamba_wave and "wave" not in ablate, "particle" not in ablate
    if config.core == "seed":
        s = ops.sigmoid(dense(params["fast"], ops.concatenate(s, e, c, axis=-1)))
        shown = s
        if wave:
            emitted, w = wave_step(params["wave"], config, w, e)
            w = saturate(w, config)
            shown = shown + dense(params["u_w"], emitted)
        if particle:
            p = ops.tanh(dense(params["particle"], ops.concatenate(p, e, s, axis=-1)))
            shown = shown + dense(params["u_p"], p)
        return shown, s, w, p
    z = dense(params["z"], e)
    gate = ops.sigmoid(dense(params["gate"], ops.concatenate(s, e, c, axis=-1)))
    if particle:
        seen = [p, z, c] if config.particle_input else [p, c]
        p = saturate(p + mlp(params["particle"], ops.concatenate(*seen, axis=-1)), config)
        s = s + gate * dense(params["u_p"], p)
    if wave:
        emitted, w = wave_step(params["wave"], config, w, ops.concatenate(z, c, axis=-1))
        w = saturate(w, config)
        s = s + (1 - gate) * dense(params["u_w"], emitted)
    s = saturate(s, config)
    return s, s, w, p
