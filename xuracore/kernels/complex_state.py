"""The complex state behind the rotation of Mamba-3 (arXiv 2603.15569, proposition on rotary state).

Read a pair of real state coordinates as one complex number.  With decay alpha and rotation phi the
continuous system ``h' = (a + i w) h + k v``, stepped by the exponential-trapezoidal rule, is::

    c_t = alpha_t e^{-i phi_t} (c_{t-1} + beta'_t v_{t-1} k_{t-1}) + gamma_t v_t k_t
    y_t = Re sum_n conj(q_t) c_t

Put ``c_t = e^{-i Theta_t} h_t`` with ``Theta_t = phi_1 + … + phi_t``: every ``e^{-i phi}`` cancels, and
what is left is the real recurrence of :mod:`xuracore.kernels.trapezoid` on keys and queries rotated
by ``Theta_t``.  So complex dynamics cost one cosine and sine a pair and token, and no complex state.

This form multiplies complex numbers token by token.  It is the independent oracle of the rotated
form, and what to read when a sign is in doubt.
"""

import numpy as np


def complex_state_scan(query, key, value, decay, turn, gamma, behind):
    """One head from a zero state.  Returns (y (L, P), c (P, M) the last state).

    query, key : (L, M) complex, one number for each pair of real coordinates, not rotated.
    value : (L, P).  decay, gamma, behind : (L,), alpha, gamma and beta' above.  turn : (L, M), phi.
    """
    state = np.zeros((value.shape[1], key.shape[1]), complex)
    y = np.empty(value.shape)
    previous = np.zeros_like(state)
    for t in range(len(value)):
        entered = np.outer(value[t], key[t])
        state = decay[t] * np.exp(-1j * turn[t]) * (state + behind[t] * previous) + gamma[t] * entered
        y[t] = (state @ query[t].conj()).real
        previous = entered
    return y, state
