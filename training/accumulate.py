"""Gradient accumulation for losses that compare the samples of a batch with each other.

A contrastive loss over small batches has few negatives, and averaging its gradients over several of them
does not bring more.  Two passes do (as in OpenCLIP's ``accum-freq``; Gao et al. 2021, "GradCache"): first
the features of all batches without recording, then the joint loss over them and its gradient with respect
to every feature, last each batch again, recorded, with that gradient as its cotangent.  The result is
the gradient of one large batch, in the memory of a small one.

On several ranks the features of all are gathered, each rank computes the same joint loss over them and takes
its gradient back to its own rows alone; a sum over the ranks is then the gradient of one large batch as well.
The joint loss itself is computed on every rank: its matrix products are small beside those of the features.
"""

import numpy as np

import xuracore as xc
from training.checkpoint import generator_state, module_generators, restore_generator
from training.parallel import ALONE
from xuracore import ops
from xuracore.errors import ConfigError


class TwoPass:
    """A loss function for the Trainer, joint over the batches that are accumulated in a step, on all ranks.

    features(model, batch, rng) → tuple of Tensors with one row per sample.
    joint(model, features, batches) → (loss, metrics): ``features`` as above with the rows of all
        ``batches`` one after the other.  What it uses of the model beside them gets its gradient here.
    share(batch) → the part of a batch that ``joint`` looks at, as JSON data, for the other ranks.
    own(model, features, batch, batches) → (loss or None, metrics): a part of the loss that needs the features of
        this ``batch`` alone, so that no rank computes another's.  Both add up over all ``batches``.
    """

    def __init__(self, features, joint, share=None, own=None):
        self.features, self.joint, self.share = features, joint, share
        self.own = own or (lambda model, features, batch, batches: (None, {}))

    def __call__(self, model, batch, rng):
        features = self.features(model, batch, rng)
        loss, metrics = self.joint(model, features, [batch])
        part, more = self.own(model, features, batch, [batch])
        return loss if part is None else loss + part, {**metrics, **more}

    def accumulate(self, model, batches, rngs, ranks=ALONE):
        """Add the gradient of the joint loss to the parameters; returns (loss as float, metrics).

        rngs : for each batch, a function that returns its generator, the same one at every call.
        ranks : whose *mean* of the gradients is that of the joint loss.
        """
        generators = module_generators(model)  # dropout must fall alike in both passes
        found, states, live = [], [], None
        for batch, rng in zip(batches, rngs):
            states.append({name: generator_state(g) for name, g in generators.items()})
            if len(batches) == 1:  # one pass is enough: it can be recorded and wait
                live = self.features(model, batch, rng())
                found.append([feature.data for feature in live])
            else:
                with xc.no_grad():
                    found.append([feature.data for feature in self.features(model, batch, rng())])
        rows = [np.concatenate(parts) for parts in zip(*found)]
        loss, metrics, everything, cotangents = self._joint_gradient(model, rows, batches, ranks)
        if cotangents is None:
            return loss, metrics
        start = [0] * len(rows)
        for batch, rng, state, parts in zip(batches, rngs, states, found):
            features = live
            if live is None:
                for name, generator in generators.items():
                    restore_generator(generator, state[name])
                features = self.features(model, batch, rng())
            stop = [first + len(part) for first, part in zip(start, parts)]
            total = _weighted_sum(features, [None if c is None else c[i:j] for c, i, j in zip(cotangents, start, stop)])
            start = stop
            part, more = self.own(model, features, batch, everything)
            if part is not None:
                part = part * float(ranks.size)
                loss, total = loss + part.item(), part if total is None else total + part
            metrics.update({name: metrics.get(name, 0.0) + ranks.size * value for name, value in more.items()})
            if total is not None:
                total.backward()
        return loss, metrics

    def _joint_gradient(self, model, rows, batches, ranks):
        """(loss, metrics, what all ranks share of their batches, gradient of this rank's ``rows``).

        The last has an array or None per feature, and is None where the loss is not finite.  It is
        ``ranks.size`` times the derivative, since the mean over the ranks shall be that of the parameters which
        the joint loss itself uses: each rank has all of those, and only its own part of these.
        """
        start = [0] * len(rows)
        if ranks.size > 1:
            if self.share is None:
                raise ConfigError("this TwoPass was not told what ranks share of a batch; give it share=")
            told = ranks.gather([[len(part) for part in rows], [self.share(batch) for batch in batches]])
            start = [sum(counts[i] for counts, _ in told[: ranks.rank]) for i in range(len(rows))]
            batches = [batch for _, shared in told for batch in shared]
        leaves = [xc.Tensor(ranks.gather_rows(part), requires_grad=True) for part in rows]
        loss, metrics = self.joint(model, tuple(leaves), batches)
        if not np.isfinite(loss.data):
            return loss.item(), metrics, batches, None
        loss.backward()
        return loss.item(), dict(metrics), batches, [
            None if leaf.grad is None else leaf.grad[first : first + len(part)] * ranks.size
            for leaf, first, part in zip(leaves, start, rows)
        ]


def _weighted_sum(features, cotangents):
    """The Tensor whose gradient with respect to the features are the cotangents; None if none is wanted."""
    total = None
    for feature, cotangent in zip(features, cotangents):
        if feature.requires_grad and cotangent is not None:
            part = ops.sum(feature * cotangent)
            total = part if total is None else total + part
    return total
