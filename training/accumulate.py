"""Gradient accumulation for losses that compare the samples of a batch with each other.

A contrastive loss over small batches has few negatives, and averaging its gradients over several of them
does not bring more.  Two passes do (as in OpenCLIP's ``accum-freq``; Gao et al. 2021, "GradCache"): first
the features of all batches without recording, then the joint loss over them and its gradient with respect
to every feature, last each batch again, recorded, with that gradient as its cotangent.  The result is
the gradient of one large batch, in the memory of a small one.
"""

import numpy as np

import xuracore as xc
from training.checkpoint import generator_state, module_generators, restore_generator
from xuracore import ops


class TwoPass:
    """A loss function for the Trainer, joint over the batches that are accumulated in a step.

    features(model, batch, rng) → tuple of Tensors with one row per sample.
    joint(model, features, batches) → (loss, metrics): ``features`` as above with the rows of all
        ``batches`` one after the other.  What it uses of the model beside them gets its gradient here.
    """

    def __init__(self, features, joint):
        self.features, self.joint = features, joint

    def __call__(self, model, batch, rng):
        return self.joint(model, self.features(model, batch, rng), [batch])

    def accumulate(self, model, batches, rngs):
        """Add the gradient of the joint loss to the parameters; returns (loss as float, metrics).

        rngs : for each batch, a function that returns its generator, the same one at every call.
        """
        generators = module_generators(model)  # dropout must fall alike in both passes
        found, states = [], []
        for batch, rng in zip(batches, rngs):
            states.append({name: generator_state(g) for name, g in generators.items()})
            with xc.no_grad():
                found.append([feature.data for feature in self.features(model, batch, rng())])
        leaves = [xc.Tensor(np.concatenate(rows), requires_grad=True) for rows in zip(*found)]
        loss, metrics = self.joint(model, tuple(leaves), batches)
        if not np.isfinite(loss.data):
            return loss.item(), metrics
        loss.backward()
        gradients, start = [leaf.grad for leaf in leaves], 0
        for batch, rng, state, rows in zip(batches, rngs, states, found):
            for name, generator in generators.items():
                restore_generator(generator, state[name])
            stop = start + len(rows[0])
            self._again(model, batch, rng(), [None if g is None else g[start:stop] for g in gradients])
            start = stop
        return loss.item(), metrics

    def _again(self, model, batch, rng, cotangents):
        """Features once more, recorded; backward through all of them at once."""
        total = None
        for feature, cotangent in zip(self.features(model, batch, rng), cotangents):
            if feature.requires_grad and cotangent is not None:
                part = ops.sum(feature * cotangent)
                total = part if total is None else total + part
        if total is not None:
            total.backward()
