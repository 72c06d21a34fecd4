"""The residual layer that predictor, Y-Encoder and Y-Decoder are made of."""

from xuracore import nn
from xuramamba import Bidirectional, Mamba3
from xuravljepa import angn


class Layer(nn.Module):
    """h + mixer(gate(norm h)); without ``gates`` the gate is left out, with ``bidirectional`` there are two mixers.

    h (B, L, d_model) and the mixer's state in, both out.  mask (B, L) or None: where False, the state
    passes by untouched.  modality (L,): the kind of each position, for the gate.  offset: of the mixer.
    """

    def __init__(self, config, *, rng, gates=False, bidirectional=False):
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.gate = angn.Gate(config.d_model) if gates else None
        mixers = [Mamba3(config.d_model, d_state=config.d_state, expand=config.expand, headdim=config.headdim,
                         is_outproj_norm=True, rng=rng) for _ in range(2 if bidirectional else 1)]
        for mixer in mixers:
            # What is recalled should not have to outshout what stands here: each head's output is normalised,
            # and the skip starts at zero (the residual stream is skip enough).
            mixer.D.data[:] = 0
            # The sum of n branches keeps the size of one.
            mixer.out_proj.weight.data /= (config.n_layers * len(mixers)) ** 0.5
        self.mixer = Bidirectional(*mixers) if bidirectional else mixers[0]

    def forward(self, h, state=None, mask=None, modality=None, offset=None):
        z = self.norm(h)
        if self.gate is not None:
            z = self.gate(z, modality, mask)
        more = {} if offset is None else {"offset": offset}
        y, state = self.mixer(z, state, mask=mask, **more)
        return h + y, state
